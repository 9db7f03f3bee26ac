"""What `isotune inspect` shows of an adapter: the measurements of its layers as a table and as one picture."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.diagnostics.inspect import MISSING_BASE, AdapterReport, LayerReport
from isotune.versions import install
from isotune.whole_files import written_whole

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_FROM_FILE = (
    ("rank", "{}", "rank"),
    ("accum.\nrank", "{}", "accumulated_rank"),
    ("orth.\nerror", "{:.0e}", "orthogonality_error"),
    ("largest\nangle °", "{:.1f}", "largest_angle"),
    ("α\nmin…max", "{:.3f}…{:.3f}", "alpha"),
    ("β\nmin…max", "{:.3f}…{:.3f}", "beta"),
)
_FROM_BASE = (
    ("energy\nheld", "{:.1%}", "energy"),
    ("‖ΔW‖", "{:.3g}", "update_norm"),
    ("‖ΔW‖\n/ ‖W‖", "{:.2%}", "relative_norm"),
    ("in the top\nk", "{}", "top"),
    ("ρ of k", "{:.1%}", "interference"),
    ("stable\nrank", "{:.1f}", "stable_rank"),
    ("entropy\nrank", "{:.1f}", "entropy_rank"),
    ("angles moved\nmax °", "{:.3g}", "angle_moved_largest"),
    ("angles moved\nmean °", "{:.3g}", "angle_moved_mean"),
)
"""Heading, how a value is written, and the field of a layer's report."""
_SHORT = (
    "rank",
    "accumulated_rank",
    "orthogonality_error",
    "largest_angle",
    "energy",
    "relative_norm",
    "interference",
    "angle_moved_largest",
)
SHORTENED = 20
"""How many layers the short table has."""


def _cell(layer: LayerReport, pattern: str, field: str) -> str:
    value = getattr(layer, field)
    return "–" if value is None else pattern.format(*(value if isinstance(value, tuple) else (value,)))


def to_text(report: AdapterReport, width: int | None = None, *, everything: bool = True) -> str:
    """The report as an aligned table, a line of what is missing, and the summary.

    Args:
        width: characters a line; None takes what the table needs, so that a file or a pipe gets no broken line.
        everything: all layers in the order of the model with all columns; else the SHORTENED layers that were turned
            farthest, or changed most where no angle is known, and the columns that fit into 100 characters.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns: tuple[tuple[str, str, str], ...] = _FROM_FILE if report.base is None else _FROM_FILE + _FROM_BASE
    if not report.moves:
        columns = tuple(column for column in columns if column[2] != "accumulated_rank")
    layers, left_out = report.layers, 0
    if not everything:
        columns = tuple(column for column in columns if column[2] in _SHORT)
        layers = sorted(
            layers, key=lambda layer: (layer.largest_angle or 0.0, layer.relative_norm or 0.0), reverse=True
        )
        layers, left_out = layers[:SHORTENED], len(layers) - SHORTENED
    prefix = _common_prefix([layer.module for layer in report.layers])
    table = Table(box=box.SIMPLE_HEAD, title=None, pad_edge=False)
    table.add_column(f"layer\n({prefix}…)" if prefix else "layer", no_wrap=everything, overflow="fold")
    for title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(layer.module.removeprefix(prefix), *(_cell(layer, *column) for _, *column in columns))
    console = Console(width=width or (10_000 if everything else 100), color_system=None, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    if left_out > 0:
        lines.append(f"{left_out} more layers; all of them, with every column: --all")
    if report.base is None:
        lines.append(MISSING_BASE)
    lines.append(report.summary())
    return "\n".join(lines).strip("\n")


def _common_prefix(names: list[str]) -> str:
    """The whole parts, with the dot after them, that all names begin with."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0] + ".")
    return "".join(shared)


@dataclass(frozen=True)
class _Panel:
    title: str
    label: str
    fields: tuple[str, ...]
    """One line each, the second dashed; two lines for a field that holds a range."""
    percent: bool = False
    logarithmic: bool = False


_PANELS = (
    _Panel("Largest rotation angle", "degrees", ("largest_angle",)),
    _Panel("Orthogonality error of R", "largest |RᵀR − I|", ("orthogonality_error",), logarithmic=True),
    _Panel("α: smallest and largest", "", ("alpha",)),
    _Panel("β: smallest and largest", "", ("beta",)),
    _Panel("Energy in the principal subspace", "share of ‖W‖²", ("energy",), percent=True),
    _Panel("Size of the update", "‖ΔW‖ / ‖W‖", ("relative_norm",), percent=True),
    _Panel("Update in the strongest directions (ρ of k)", "share of ‖ΔW‖²", ("interference",), percent=True),
    _Panel("Rank of the update: stable (solid), entropy (dashed)", "directions", ("stable_rank", "entropy_rank")),
    _Panel(
        "Angles of principal weights moved: mean (solid), largest (dashed)",
        "degrees",
        ("angle_moved_mean", "angle_moved_largest"),
    ),
)


def save_png(report: AdapterReport, path: str | os.PathLike[str]) -> None:
    """Draw the report over the layers as one PNG: one panel for each quantity, one colour for each kind of module.

    Args:
        report: of `inspect`.
        path: ends in .png.

    Raises:
        ValueError: the name does not end in .png, or matplotlib is missing.
        OSError: the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png; only that format is written.")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"the picture needs matplotlib: {install('report')}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [p for p in _PANELS if any(getattr(layer, p.fields[0]) is not None for layer in report.layers)]
    series = _series(report.layers)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        size = (11, 2.2 * rows + 1)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, layout="constrained")
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw(axis, panel, series)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        numbered = [bool(_BLOCK.search(layer.module)) for layer in report.layers]
        mixed = any(numbered) and not all(numbered)
        outside = "; beyond the last: modules outside of blocks" if mixed else ""
        for axis in axes[-1]:
            axis.set_xlabel(f"block of the model{outside}")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            title=f"{report.method}  ·  {Path(report.directory).name}",
            title_fontproperties={"weight": "bold", "size": 11},
            loc="outside upper center",
            ncols=min(6, len(labels)),
            frameon=False,
        )
        figure.align_ylabels()
        try:
            with written_whole(Path(path)) as partial:
                figure.savefig(partial, dpi=130)
        finally:
            pyplot.close(figure)


def _series(layers: Sequence[LayerReport]) -> dict[str, list[tuple[int, LayerReport]]]:
    """The layers by kind of module (their name after the block's number), each with the number of its block."""
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    found = [_BLOCK.search(layer.module) for layer in layers]
    beyond = 1 + max((int(number[1]) for number in found if number), default=-1)
    for layer, number in zip(layers, found, strict=True):
        kind = layer.module[number.end() :] if number else layer.module
        kinds.setdefault(kind or layer.module, []).append((int(number[1]) if number else beyond, layer))
    return kinds


def _draw(axis: Any, panel: _Panel, series: dict[str, list[tuple[int, LayerReport]]]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    palette = colormaps["tab10" if len(series) <= 10 else "tab20"]
    dots = {"marker": "o", "markersize": 3, "linewidth": 1.3}
    for index, (kind, members) in enumerate(series.items()):
        colour = palette(index % palette.N)
        for field, line in zip(panel.fields, ("-", "--"), strict=False):
            points = [(x, value) for x, layer in members if (value := getattr(layer, field)) is not None]
            if not points:
                continue
            xs, values = zip(*points, strict=True)
            label = kind if field == panel.fields[0] else None
            # Of a range, matplotlib draws both columns as a line each.
            axis.plot(xs, values, line, color=colour, label=label, **dots)
    axis.set_title(panel.title, loc="left", fontsize=9)
    axis.set_ylabel(panel.label)
    axis.grid(axis="y", alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.logarithmic:
        axis.set_yscale("log")
    elif panel.fields[0] not in ("alpha", "beta"):
        axis.set_ylim(bottom=0)
    if panel.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
