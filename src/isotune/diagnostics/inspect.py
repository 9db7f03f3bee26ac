"""What an adapter has learnt, layer by layer: as a table, as JSON and as one picture."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.rotation import RotationAdapter
from isotune.diagnostics import geometry
from isotune.diagnostics.turn import MAX_DENSE, basis_of, turn, turned_weights
from isotune.files.adapter import ADAPTER, AdapterFile, describe, read_config
from isotune.files.base_model import load_base
from isotune.methods.config import SubspaceConfig
from isotune.tuner.layer import Layer

MISSING_BASE = (
    "Not shown, as they need the base model (--base MODEL): energy captured, size and ranks of the update, and how far "
    "the angles of the principal weights moved."
)

Range = tuple[float, float]


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer. None stands for what the base model would have to be there for, or what does not exist."""

    module: str
    rank: int
    """Of the principal subspace; for a rotation of all inputs their number."""
    orthogonality_error: float
    """Largest entry of |RᵀR − I|; large on purpose for a free matrix."""
    largest_angle: float | None
    """Largest rotation angle of R, degrees; None for a free matrix and where it would take too long."""
    alpha: Range | None
    """Smallest and largest entry."""
    beta: Range | None
    base_residual: float | None = None
    """How far this base is from the one trained on: about 1e-5 for the same (the adapter's pin says)."""
    energy: float | None = None
    """Share of ‖W‖_F² in the principal subspace."""
    update_norm: float | None = None
    """‖ΔW‖_F."""
    relative_norm: float | None = None
    """‖ΔW‖_F / ‖W‖_F."""
    stable_rank: float | None = None
    entropy_rank: float | None = None
    """Of ΔW, as isotune.diagnostics.geometry defines them."""
    angle_moved_largest: float | None = None
    angle_moved_mean: float | None = None
    """Change of the angles between the rows of the principal weight P V, or of W under a rotation, degrees."""


@dataclass(frozen=True)
class AdapterReport:
    """A whole adapter."""

    directory: str
    method: str
    base: str | None
    """None if no base model was looked at."""
    parameters: int
    """Trainable parameters in the adapted layers."""
    layers: list[LayerReport]
    subspaces: bool = True
    """Whether the method acts on principal subspaces, or else rotates all inputs."""

    def summary(self) -> str:
        """One line about all layers."""
        ranks = sorted({layer.rank for layer in self.layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        parts = [
            f"{self.method}: {len(self.layers)} layers of {'rank' if self.subspaces else 'width'} {shown}, "
            f"{self.parameters:,} trained parameters",
            f"orthogonality error at most {_most(self.layers, 'orthogonality_error'):.1e}",
        ]
        if any(layer.largest_angle is not None for layer in self.layers):
            parts.append(f"rotated by at most {_most(self.layers, 'largest_angle'):.1f}°")
        if self.base is not None:
            if self.subspaces:
                energies = [layer.energy for layer in self.layers if layer.energy is not None]
                parts.append(f"principal subspaces hold {min(energies):.0%} to {max(energies):.0%} of the energy")
            parts.append(f"update at most {_most(self.layers, 'relative_norm'):.1%} of the weight")
            what = "principal weights" if self.subspaces else "weights"
            parts.append(f"angles of {what} moved by at most {_most(self.layers, 'angle_moved_largest'):.2g}°")
        return "; ".join(parts) + "."

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every field, the summary, and what is missing."""
        missing = None if self.base is not None else MISSING_BASE
        return {**dataclasses.asdict(self), "summary": self.summary(), "missing": missing}


def inspect(
    directory: str | os.PathLike[str], base: nn.Module | str | None = None, *, trust_remote_code: bool = False
) -> AdapterReport:
    """Measure an isotune adapter folder, with its base model where there is one.

    Args:
        directory: the adapter's folder.
        base: the base model or its name; by default what the adapter's config names, and if that cannot be loaded the
            report holds what the file alone says.
        trust_remote_code: run code that the base model's repository carries.

    Raises:
        AdapterFileError: the folder is not a sound isotune adapter.
        BaseMismatchError: the base is another one than the adapter was trained on.
        ValueError: a base that was asked for cannot be loaded.
    """
    file = describe(directory)
    raw = read_config(directory)
    name = base if isinstance(base, str) else raw.get("base_model_name_or_path")
    model = base if isinstance(base, nn.Module) else None
    if model is None and name:
        try:
            model = load_base(str(name), raw, trust_remote_code=trust_remote_code)
        except ValueError:
            if base is not None:
                raise
    placed = {} if model is None else file.place(model)
    parameters = sum(t.numel() for layer in file.layers.values() for k, t in layer.items() if "_operator." in k)
    with torch.no_grad():
        layers = [_measure(file, module, placed.get(module)) for module in file.layers]
    label = None if model is None else str(name or type(model).__name__)
    subspaces = isinstance(file.config, SubspaceConfig)
    return AdapterReport(str(directory), str(raw["peft_type"]), label, parameters, layers, subspaces)


def _measure(file: AdapterFile, module: str, layer: Layer | None) -> LayerReport:
    operator: Any = file.operator(module)
    turned = turn(operator)
    rotates = isinstance(operator, RotationAdapter)
    report = LayerReport(
        module=module,
        rank=operator.size,
        orthogonality_error=turned.orthogonality_error,
        largest_angle=None if turned.angles is None else math.degrees(float(turned.angles[0])),
        alpha=None if rotates else _range(getattr(operator, "input_scale", None)),
        beta=_range(operator.gain if rotates else getattr(operator, "output_scale", None)),
    )
    if layer is None:
        return report
    before, after = turned_weights(layer, ADAPTER)
    moved = geometry.angle_change(before, after)
    if rotates:
        change = after - before
        values = torch.linalg.svdvals(change) if min(change.shape) <= MAX_DENSE else None
        return _with_update(report, before, torch.linalg.vector_norm(change), values, moved)
    weight = layer.unmerged_matrix().float()
    up, down = layer.low_rank(ADAPTER)
    values = geometry.factored_singular_values(up, down)
    return dataclasses.replace(
        _with_update(report, weight, torch.linalg.vector_norm(values), values, moved),
        base_residual=getattr(getattr(layer.adapter(ADAPTER), "placement", None), "residual", None),
        energy=geometry.energy_captured(weight, basis_of(down)),
    )


def _with_update(
    report: LayerReport, weight: Tensor, norm: Tensor, values: Tensor | None, moved: geometry.Change
) -> LayerReport:
    """The report with the update's size, its ranks where its singular values are known, and the angles it moves."""
    size = float(norm)
    return dataclasses.replace(
        report,
        update_norm=size,
        relative_norm=size / max(float(torch.linalg.vector_norm(weight)), torch.finfo(torch.float32).tiny),
        stable_rank=None if values is None else geometry.stable_rank(values),
        entropy_rank=None if values is None else geometry.entropy_rank(values),
        angle_moved_largest=math.degrees(moved.largest),
        angle_moved_mean=math.degrees(moved.mean),
    )


def _range(vector: Tensor | None) -> Range | None:
    return None if vector is None else (float(vector.min()), float(vector.max()))


def _most(layers: Sequence[LayerReport], field: str) -> float:
    values: list[float] = [getattr(layer, field) for layer in layers]
    return max(value for value in values if value is not None)


# -- the table --------------------------------------------------------------------------------------------------------


def _number(pattern: str, field: str) -> Callable[[LayerReport], str]:
    def show(layer: LayerReport) -> str:
        value = getattr(layer, field)
        return "–" if value is None else pattern.format(value)

    return show


def _between(field: str) -> Callable[[LayerReport], str]:
    def show(layer: LayerReport) -> str:
        value = getattr(layer, field)
        return "–" if value is None else f"{value[0]:.3f}…{value[1]:.3f}"

    return show


_FROM_FILE: tuple[tuple[str, Callable[[LayerReport], str]], ...] = (
    ("rank", _number("{}", "rank")),
    ("orth.\nerror", _number("{:.0e}", "orthogonality_error")),
    ("largest\nangle °", _number("{:.1f}", "largest_angle")),
    ("α\nmin…max", _between("alpha")),
    ("β\nmin…max", _between("beta")),
)
_FROM_BASE: tuple[tuple[str, Callable[[LayerReport], str]], ...] = (
    ("energy\nheld", _number("{:.1%}", "energy")),
    ("‖ΔW‖", _number("{:.3g}", "update_norm")),
    ("‖ΔW‖\n/ ‖W‖", _number("{:.2%}", "relative_norm")),
    ("stable\nrank", _number("{:.1f}", "stable_rank")),
    ("entropy\nrank", _number("{:.1f}", "entropy_rank")),
    ("angles moved\nmax °", _number("{:.3g}", "angle_moved_largest")),
    ("angles moved\nmean °", _number("{:.3g}", "angle_moved_mean")),
)


def to_text(report: AdapterReport, width: int | None = None) -> str:
    """The report as an aligned table, a line of what is missing, and the summary.

    Args:
        width: characters a line; None takes what the table needs, so that a file or a pipe gets no broken line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = _FROM_FILE if report.base is None else _FROM_FILE + _FROM_BASE
    prefix = _common_prefix([layer.module for layer in report.layers])
    table = Table(box=box.SIMPLE_HEAD, title=None, pad_edge=False)
    table.add_column(f"layer\n({prefix}…)" if prefix else "layer", no_wrap=True, overflow="fold")
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for layer in report.layers:
        table.add_row(layer.module.removeprefix(prefix), *(show(layer) for _, show in columns))
    console = Console(width=width or 10_000, color_system=None, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
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


# -- the picture ------------------------------------------------------------------------------------------------------


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
        ValueError: the name does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png; only that format is written.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [p for p in _PANELS if any(getattr(layer, p.fields[0]) is not None for layer in report.layers)]
    series = _series(report.layers)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        size = (11, 2.2 * rows + 1)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, layout="constrained")
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw(axis, panel, series)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        outside = "; beyond the last: modules outside of blocks" if _outside(report.layers) else ""
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
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def _outside(layers: Sequence[LayerReport]) -> bool:
    """Whether some layers, and not all, are in no numbered block."""
    numbered = [bool(_BLOCK.search(layer.module)) for layer in layers]
    return any(numbered) and not all(numbered)


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
