"""What adapters did to angles and norms: heat maps of a layer, and rotation angles layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from isotune.experiments.outcome import MethodResult
from isotune.experiments.records import Geometry
from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import axis, hover, line, safe
from isotune.report.results import Comparison

Measured = Sequence[tuple[MethodResult, Geometry]]

_MOST_MAPS = 4
_FRAME = {"showgrid": False, "showticklabels": False, "ticks": "", "showline": True, "mirror": True}
_BAR = {"thickness": 10, "ticksuffix": "°", "outlinewidth": 0, "nticks": 5}
_STILL = 0.01
"""Degrees that no heat map shows."""
_NOTHING = {
    "text": "strict:<br>nothing moved",
    "x": 0.5,
    "y": 0.5,
    "xref": "paper",
    "yref": "paper",
    "showarrow": False,
    "font": {"size": 14, "color": "@muted"},
}
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def geometry(comparison: Comparison, looks: Looks) -> Section | None:
    """Heat maps and rotation angles of the methods whose runs measured them."""
    measured = [(variant, found) for variant in comparison.variants if (found := variant.geometry)]
    figures = _rotations(measured, looks) + _maps(measured)
    if not figures:
        return None
    text = (
        "Strict methods keep every norm and every angle between two rows of the weight that they turn; relaxed ones "
        "move them. Heat maps are of the layer that changed most."
    )
    return Section("geometry", "Geometry", text, figures)


def _maps(measured: Measured) -> list[Figure]:
    figures = []
    for order, (variant, found) in enumerate(_examples(measured)):
        shown = next(iter(found.heat_maps), None)
        if shown is None or not shown.before:
            continue
        count = len(shown.rows)
        differences = [a - b for a, b in zip(shown.after, shown.before, strict=True)]
        low, high = math.floor(min(*shown.before, *shown.after)), math.ceil(max(*shown.before, *shown.after))
        most = max(abs(difference) for difference in differences)
        moved = next((r.angles_moved.largest for r in found.layers if r.module == shown.module), most)
        name, layer = f"{variant.title}, {'strict' if found.strict else 'relaxed'}", _layer(shown.module)
        rows = f"of {count} rows of the {'principal weight P V' if found.subspaces else 'weight'} in {layer}"
        angles = {"colorscale": "Cividis", "zmin": low, "zmax": high}
        reach = max(1.0, math.ceil(most))
        diverging = [[0, "#3b6fc4"], [0.5, "@panel"], [1, "#c2492e"]]
        still = found.strict and moved < _STILL
        change = "nothing moved" if still else "after − before"
        for key, title, values, scale in (
            ("before", "before training", shown.before, angles),
            ("after", "after training", shown.after, angles),
            ("change", change, differences, {"colorscale": diverging, "zmin": -reach, "zmax": reach}),
        ):
            trace = {"type": "heatmap", "z": _square(values, count), "xgap": 0.5, "ygap": 0.5, **scale}
            trace |= {"colorbar": _BAR, "hovertemplate": hover("rows %{y} and %{x}: %{z:.2f}°")}
            frame = {**_FRAME, "constrain": "domain"}
            layout = {
                "xaxis": {**frame},
                "yaxis": {**frame, "autorange": "reversed", "scaleanchor": "x"},
                "margin": {"l": 4, "r": 4, "t": 6, "b": 6},
            }
            if key == "change" and still:
                layout["annotations"] = [_NOTHING]
            about = f"{layer}; no pair of rows moved by more than {moved:.2g}°." if key == "change" else f"{layer}."
            alt = (
                f"Heat map of the pairwise angles {rows}, {title}, for {name}. "
                f"Angles from {low}° to {high}°; the largest change is {moved:.2g}°."
            )
            figures.append(
                Figure(f"map-{order}-{key}", f"{name}: {title}", about, alt, [trace], layout, 290, width="third")
            )
    return figures


def _examples(measured: Measured) -> Measured:
    """A strict and a relaxed one, first of those on principal subspaces, then of those on whole weights."""
    chosen: dict[tuple[bool, bool], tuple[MethodResult, Geometry]] = {}
    for variant, found in measured:
        chosen.setdefault((not found.subspaces, not found.strict), (variant, found))
    order = sorted(chosen)
    return [chosen[key] for key in order if not key[0] or not any(not k[0] for k in order)][:_MOST_MAPS]


def _square(pairs: Sequence[float], count: int) -> list[list[float | None]]:
    table: list[list[float | None]] = [[None] * count for _ in range(count)]
    values = iter(pairs)
    for i in range(count):
        for j in range(i + 1, count):
            table[i][j] = table[j][i] = next(values)
    return table


def _layer(module: str) -> str:
    """encoder.layer.3.output.dense as block 3, output.dense."""
    found = _BLOCK.search(module)
    return f"block {found[1]}, {module[found.end() :]}" if found else module


def _rotations(measured: Measured, looks: Looks) -> list[Figure]:
    figures = []
    for field in ("largest", "mean"):
        title = f"{field.capitalize()} rotation angle, layer by layer"
        data: list[Spec] = []
        listed: list[str] = []
        modules: list[str] = []
        for variant, found in measured:
            names = [row.module for row in found.layers]
            turned = [(row.module, getattr(row.rotation, field)) for row in found.layers if row.rotation is not None]
            if not turned:
                continue
            modules = names if len(names) > len(modules) else modules
            listed.append(f"{variant.title} up to {max(angle for _, angle in turned):.1f}°")
            texts = [hover(safe(variant.title), safe(_layer(module)), "%{y:.2f}°") for module, _ in turned]
            points = [(names.index(module), angle) for module, angle in turned]
            data.append(line(looks, variant, points, texts, width=1.2, size=5))
        if data:
            layout = {
                "xaxis": axis("layer, by block of the model", **_blocks(modules)),
                "yaxis": {"ticksuffix": "°", "rangemode": "tozero"},
            }
            alt = f"{title}: {', '.join(listed)}."
            figures.append(Figure(f"rotation-{field}", title, "", alt, data, layout, 330, width="half"))
    return figures


def _blocks(modules: Sequence[str]) -> Spec:
    """Ticks where a numbered block of the model begins."""
    marks: dict[str, int] = {}
    for position, module in enumerate(modules):
        found = _BLOCK.search(module)
        if found:
            marks.setdefault(found[1], position)
    every = -(-len(marks) // 12) or 1
    chosen = list(marks.items())[::every]
    return {"tickvals": [position for _, position in chosen], "ticktext": [name for name, _ in chosen]}
