"""One method at several sizes, and PSOFT with and without its vectors."""

from __future__ import annotations

import math
from typing import Any

from isotune.experiments.outcome import MethodResult
from isotune.experiments.records import number
from isotune.experiments.registry import entry
from isotune.report.columns import count
from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import axis, circles, error, hover, marked, mean, names, safe, scores, spread
from isotune.report.results import Comparison


def _trained(variant: MethodResult) -> str:
    return f"{count(variant.average('trainable_parameters') or 0)} trainable parameters"


def sizes(comparison: Comparison, looks: Looks) -> Section | None:
    """The score over rank or block size, of methods that differ in nothing else."""
    families: dict[tuple[Any, ...], list[tuple[float, MethodResult]]] = {}
    for variant in comparison.scored:
        key = next((key for key in entry(variant.name).size_names if key in variant.method), "")
        value = number(variant.method.get(key))
        if value is not None and value > 0:
            rest = tuple(sorted((k, repr(v)) for k, v in variant.method.items() if k != key))
            families.setdefault((key, *rest), []).append((value, variant))
    shown = {key: sorted(v, key=lambda pair: pair[0]) for key, v in families.items() if len(v) > 1}
    if not shown:
        return None
    data: list[Spec] = []
    listed = []
    for (key, *_), members in shown.items():
        first = members[0][1]
        letter = entry(first.name).size_names[key]
        name = first.title.replace(f" {letter}={first.method[key]}", "", 1)
        listed.append(f"{name}: " + ", ".join(f"{x:g} {comparison.shown(v.mean)}" for x, v in members))
        texts = [hover(safe(v.title), comparison.shown(v.mean, v.standard_error), _trained(v)) for _, v in members]
        data.append(
            {
                "name": safe(name),
                "type": "scatter",
                "mode": "lines+markers",
                "x": [x for x, _ in members],
                "y": [v.mean for _, v in members],
                "error_y": error([v.standard_error or 0 for _, v in members], 1.2, 3),
                "line": {"color": looks.colour(first), "width": 1.8},
                "marker": {"size": 9, "symbol": looks.symbol(first)},
                "hovertemplate": texts,
                "showlegend": True,
            }
        )
    places = sorted({x for members in shown.values() for x, _ in members})
    ends = [math.log10(places[0]) - 0.1, math.log10(places[-1]) + 0.1]
    title = "rank or block size" if any(key != "r" for key, *_ in shown) else "rank"
    layout = {
        "xaxis": axis(title, type="log", **marked(places, [f"{place:g}" for place in places], ends)),
        "yaxis": scores(comparison, f"test {comparison.metric_name}"),
        "showlegend": len(shown) > 1,
    }
    caption = "Mean of the seeds with one standard error."
    figure = Figure("sizes", "Quality over the rank", caption, "; ".join(listed) + ".", data, layout, 360)
    return Section("ranks", "Rank sensitivity", "", [figure], named=True)


_VECTORS = {(False, False): "none", (True, False): "α", (False, True): "β", (True, True): "α and β"}


def vectors(comparison: Comparison, looks: Looks) -> Section | None:
    """PSOFT with none, one and both of its vectors, and with a free R."""
    families: dict[tuple[Any, ...], dict[str, MethodResult]] = {}
    for variant in comparison.scored:
        known = entry(variant.name)
        if known.base != "psoft":
            continue
        options = {**known.fixed, **variant.method}
        found = _VECTORS[bool(options.pop("psoft_mag_a", True)), bool(options.pop("psoft_mag_b", True))]
        if not options.pop("psoft_orth", True):
            found = "free R" + ("" if found == "none" else f", {found}")
        options.pop("name", None)
        families.setdefault(tuple(sorted((k, repr(v)) for k, v in options.items())), {})[found] = variant
    several = [members for members in families.values() if len(members) > 1]
    if not several:
        return None
    order = list(_VECTORS.values())
    members = sorted(
        max(several, key=len).items(),
        key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), pair[0]),
    )
    data: list[Spec] = []
    for column, (what, variant) in enumerate(members):
        places = [column + offset for offset in spread(len(variant.scores), 0.24)]
        data += [
            circles(variant, places, variant.scores, hover(what, "%{y:.4f}"), looks.colour(variant)),
            mean(comparison, looks, variant, along="y", at=column, text=[what, _trained(variant)]),
        ]
    layout = {
        "xaxis": names([what for what, _ in members], "trained besides the rotation"),
        "yaxis": scores(comparison, f"test {comparison.metric_name}"),
    }
    alt = "; ".join(f"{what}: {comparison.shown(v.mean, v.standard_error)}" for what, v in members)
    caption = "Circles: seeds; diamonds: their mean with one standard error."
    figure = Figure("vectors", "PSOFT with and without its vectors", caption, alt + ".", data, layout, 340)
    text = "None is the strict method, which keeps angles and norms; α and β scale the principal directions."
    return Section("vectors", "Tunable vectors", text, [figure], named=True)
