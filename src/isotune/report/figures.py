"""The plots of a comparison as plotly figures, in colours that the page fills in for light and dark."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isotune.report.results import SIZES, Comparison, Run, Variant, count, duration, pareto, size

PALETTES = {
    "light": {
        "paper": "#ffffff",
        "panel": "#ffffff",
        "ink": "#1b232d",
        "muted": "#5a6572",
        "grid": "#dfe4ea",
        "series": (
            "#2f5fb3",
            "#b0510a",
            "#2b7a3d",
            "#c0323f",
            "#7a4bb0",
            "#0f7580",
            "#b4317f",
            "#716a12",
            "#56606d",
            "#7d4e33",
        ),
    },
    "dark": {
        "paper": "#12161c",
        "panel": "#181d25",
        "ink": "#e6eaf0",
        "muted": "#a3adba",
        "grid": "#333c48",
        "series": (
            "#7aa7f0",
            "#f0994d",
            "#6cc581",
            "#f2808a",
            "#b996ea",
            "#4fc3cc",
            "#ec86c4",
            "#c9c05a",
            "#a9b3c1",
            "#d3a183",
        ),
    },
}
"""By colour scheme; a figure says "@ink" or "@0" where it means one of these."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MOST_MAPS = 4

Spec = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A plot with what a reader who cannot see it is told."""

    key: str
    title: str
    caption: str
    alt: str
    data: list[Spec]
    layout: Spec
    height: int
    width: str = "wide"
    """Where there is room two of "half" or three of "third" stand side by side."""


@dataclass(frozen=True)
class Section:
    """Plots about one question."""

    key: str
    title: str
    text: str
    figures: list[Figure]
    missing: str = ""
    """What cannot be shown, and why."""


class Looks:
    """The colour and symbol of every method of a page, the same in all of its plots."""

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        titles = dict.fromkeys(v.title for c in comparisons for v in c.variants)
        self.number = {title: number for number, title in enumerate(titles)}

    def colour(self, variant: Variant) -> str:
        """As "@3"."""
        return f"@{self.number[variant.title] % len(PALETTES['light']['series'])}"

    def symbol(self, variant: Variant) -> str:
        """A plotly symbol."""
        return SYMBOLS[self.number[variant.title] % len(SYMBOLS)]

    def dash(self, variant: Variant) -> str:
        """A plotly line style; differs where the colours repeat."""
        return _DASHES[self.number[variant.title] // len(PALETTES["light"]["series"]) % len(_DASHES)]


def sections(comparison: Comparison, looks: Looks) -> list[Section]:
    """Every question that a comparison's records have an answer to, in the order of the page."""
    makers = (_seeds, _costs, _forgetting, _curves, _rates, _sizes, _vectors, _geometry)
    return [section for maker in makers if (section := maker(comparison, looks)) is not None]


# -- quality ----------------------------------------------------------------------------------------------------------


def _seeds(comparison: Comparison, looks: Looks) -> Section | None:
    shown = sorted(comparison.scored, key=lambda v: v.mean or 0.0, reverse=not comparison.higher_is_better)
    if not shown:
        return None
    data: list[Spec] = []
    for row, variant in enumerate(shown):
        runs = [run for run in variant.runs if run.score is not None]
        if runs:
            data.append(_seed_points(comparison, looks, variant, runs, row))
        data.append(
            {
                **_mean_point(comparison, looks, variant, "x", _safe(variant.title)),
                "y": [row],
            }
        )
    layout = {
        "xaxis": {**_metric_axis(comparison), "title": {"text": f"test {_metric(comparison)}"}},
        "yaxis": {
            "tickvals": list(range(len(shown))),
            "ticktext": [_safe(variant.title) for variant in shown],
            "range": [-0.6, len(shown) - 0.4],
            "showgrid": False,
        },
    }
    best = comparison.best
    how = next((run.interval_how for v in shown for run in v.runs if run.interval and run.interval_how), "")
    whiskers = f" Thin lines are each seed's own interval over the test examples ({how})." if how else ""
    figure = Figure(
        "seeds",
        f"Test {_metric(comparison)} of every seed",
        f"Each small circle is a seed; the diamond is their mean, with one standard error.{whiskers}",
        f"{len(shown)} methods, best first: "
        + ", ".join(f"{v.title} {comparison.shown(v.mean)}" for v in reversed(shown))
        + ".",
        data,
        layout,
        90 + 30 * len(shown),
    )
    text = "" if best is None else f"Best on average: {best.title}, {comparison.shown(best.mean)}."
    return Section("quality", "Quality", text, [figure])


def _seed_points(comparison: Comparison, looks: Looks, variant: Variant, runs: Sequence[Run], row: int) -> Spec:
    offsets = [0.0] if len(runs) == 1 else [0.5 * i / (len(runs) - 1) - 0.25 for i in range(len(runs))]
    spec: Spec = {
        **_named(variant),
        "type": "scatter",
        "mode": "markers",
        "x": [run.score for run in runs],
        "y": [row + offset for offset in offsets],
        "marker": {"size": 7, "color": looks.colour(variant), "symbol": "circle-open", "line": {"width": 1.5}},
        "hovertemplate": [
            f"{_safe(variant.title)}, seed {run.seed}<br>{comparison.shown(run.score)}<extra></extra>" for run in runs
        ],
    }
    if any(run.interval for run in runs):
        spec["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [run.interval[1] - (run.score or 0) if run.interval else 0 for run in runs],
            "arrayminus": [(run.score or 0) - run.interval[0] if run.interval else 0 for run in runs],
            "thickness": 1,
            "width": 0,
            "color": "@muted",
        }
    return spec


_COSTS = (
    ("trainable_parameters", "trained numbers", count, "parameters"),
    ("peak_memory_bytes", "peak memory of training", size, "memory"),
    ("kept_bytes", "kept for backward", size, "kept"),
    ("train_seconds", "training time", duration, "time"),
)


def _costs(comparison: Comparison, looks: Looks) -> Section | None:
    figures, missing = [], []
    for field, name, show, key in _COSTS:
        points = [
            (cost, variant.mean, variant)
            for variant in comparison.scored
            if (cost := variant.average(field)) is not None and variant.mean is not None
        ]
        if points:
            figures.append(_trade(comparison, looks, points, name, show, key))
        else:
            missing.append(name)
    if not figures:
        return None
    text = (
        "Filled methods are on the Pareto front, the dotted line: none that costs less is as good. Bars are one "
        "standard error."
    )
    note = f"No run recorded its {' or its '.join(missing)}." if missing else ""
    return Section("costs", "What quality costs", text, figures, note)


def _trade(
    comparison: Comparison,
    looks: Looks,
    points: list[tuple[float, float, Variant]],
    name: str,
    show: Any,
    key: str,
) -> Figure:
    front = pareto(points, higher_is_better=comparison.higher_is_better)
    members = [variant for _, _, variant in front]
    costs = [cost for cost, _, _ in points]
    spread = min(costs) > 0 and max(costs) / min(costs) > 8
    data: list[Spec] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [cost for cost, _, _ in front],
            "y": [score for _, score, _ in front],
            "line": {"color": "@muted", "width": 1.5, "shape": "hv", "dash": "dot"},
            "hoverinfo": "skip",
            "name": "Pareto front",
        }
    ]
    for cost, score, variant in points:
        on = variant in members
        data.append(
            {
                **_named(variant),
                "type": "scatter",
                "mode": "markers",
                "x": [cost],
                "y": [score],
                "marker": {
                    "size": 12 if on else 10,
                    "color": looks.colour(variant),
                    "symbol": looks.symbol(variant) + ("" if on else "-open"),
                    "line": {"width": 0 if on else 2},
                },
                "error_y": {
                    "type": "data",
                    "array": [variant.standard_error or 0],
                    "thickness": 1.2,
                    "width": 3,
                    "color": looks.colour(variant),
                },
                "hovertemplate": f"{_safe(variant.title)}<br>{show(cost)}<br>{comparison.shown(score)} "
                f"{comparison.shown_error(variant.standard_error)}<extra></extra>",
            }
        )
    axis = _ticks(costs, show, logarithmic=spread)
    layout = {
        "xaxis": {**axis, "title": {"text": name}},
        "yaxis": {
            **_metric_axis(comparison, [score for _, score, _ in points]),
            "title": {"text": f"test {_metric(comparison)}"},
        },
    }
    return Figure(
        key,
        f"Against {name}",
        "",
        f"{_metric(comparison)} against {name} of {len(points)} methods. On the Pareto front: "
        + ", ".join(f"{variant.title} ({show(cost)}, {comparison.shown(score)})" for cost, score, variant in front)
        + ".",
        data,
        layout,
        340,
        width="half",
    )


_MINUTE, _HOUR = 60.0, 3600.0
_MARKS: dict[Any, list[float]] = {
    count: [n * 10.0**e for e in range(14) for n in (1, 2, 5)],
    size: [2.0**e for e in range(50)],
    duration: [u * n for u in (1.0, _MINUTE) for n in (1, 2, 5, 10, 20, 30)]
    + [_HOUR * n * 10**e for e in range(4) for n in (1, 2, 5)],
}
"""By the function that writes a number, the numbers that look round when it has written them."""


def _ticks(values: Sequence[float], show: Any, *, logarithmic: bool) -> Spec:
    """An axis whose ticks are written as the table writes them."""
    low, high = min(values), max(values)
    if low == high:
        return {"tickvals": [low], "ticktext": [show(low)]}
    if not logarithmic:
        low = min(low, 0.0) if low < 0.5 * high else low
        step = next((mark for mark in _MARKS[show] if (high - low) / mark <= 4), 1.0)
        marks = [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
        pad = 0.06 * (high - low or step)
        marks = [mark for mark in marks if low - 0.9 * pad <= mark <= high + 0.9 * pad]
        return {"tickvals": marks, "ticktext": [_tick(m, show) for m in marks], "range": [low - pad, high + pad]}
    inside = [mark for mark in _MARKS[show] if low / 1.2 <= mark <= high * 1.2]
    decades = [mark for mark in inside if math.log10(mark).is_integer()]
    if show is count and len(decades) > 2:
        inside = decades
    marks = inside[:: -(-len(inside) // 5)]
    pad = 0.05 * math.log10(high / low) + 0.05
    return {
        "type": "log",
        "tickvals": marks,
        "ticktext": [_tick(m, show) for m in marks],
        "range": [math.log10(low) - pad, math.log10(high) + pad],
    }


def _tick(value: float, show: Any) -> str:
    if show is not count:
        return str(show(value)).replace(".0 ", " ")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g} {letter}"
    return f"{value:g}"


def _forgetting(comparison: Comparison, looks: Looks) -> Section | None:
    shown = [v for v in comparison.variants if v.average("forgetting") is not None]
    if not shown:
        return None
    shown.sort(key=lambda v: v.average("forgetting") or 0.0, reverse=True)
    data: list[Spec] = []
    # Where nothing was forgotten, as by a head alone, rounding must not fill the axis.
    largest = max(abs(run.forgetting) for v in shown for run in v.runs if run.forgetting is not None)
    tiny = {"range": [-0.01, 0.01]} if largest < 1e-3 else {}
    for row, variant in enumerate(shown):
        values = [run.forgetting for run in variant.runs if run.forgetting is not None]
        data.append(
            {
                **_named(variant),
                "type": "bar",
                "orientation": "h",
                "x": [statistics.fmean(values)],
                "y": [row],
                "marker": {"color": looks.colour(variant)},
                "width": 0.62,
                "hovertemplate": f"{_safe(variant.title)}<br>%{{x:+.4f}}<extra></extra>",
            }
        )
        data.append(
            {
                **_named(variant),
                "type": "scatter",
                "mode": "markers",
                "x": values,
                "y": [row] * len(values),
                "marker": {"size": 7, "color": "@ink", "symbol": "circle-open", "line": {"width": 1.5}},
                "hovertemplate": f"{_safe(variant.title)}<br>%{{x:+.4f}}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "change"}, "zeroline": True, "zerolinecolor": "@muted", **tiny},
        "yaxis": {
            "tickvals": list(range(len(shown))),
            "ticktext": [_safe(v.title) for v in shown],
            "range": [-0.6, len(shown) - 0.4],
            "showgrid": False,
        },
        "barmode": "overlay",
    }
    text = next((run.forgetting_text for v in shown for run in v.runs if run.forgetting_text), "")
    measure = next(run.forgetting_measure for v in shown for run in v.runs if run.forgetting is not None)
    figure = Figure(
        "forgetting",
        f"Change of {measure}",
        "Further left is better. Bars: mean over the seeds; circles: each seed." + (f" Text: {text}." if text else ""),
        "Least first: " + ", ".join(f"{v.title} {v.average('forgetting') or 0.0:+.3f}" for v in reversed(shown)) + ".",
        data,
        layout,
        90 + 30 * len(shown),
    )
    return Section(
        "forgetting", "Forgetting", "How much worse the model became at text it was not trained on.", [figure]
    )


# -- training ---------------------------------------------------------------------------------------------------------


def _curves(comparison: Comparison, looks: Looks) -> Section | None:
    figures: list[Figure] = []
    for key, field, title, axis in (
        (
            "curve-score",
            f"validation_{comparison.metric}",
            f"Validation {_metric(comparison)}",
            _metric_axis(comparison),
        ),
        ("curve-validation", "validation_loss", "Validation loss", {}),
        ("curve-loss", "loss", "Training loss", {}),
    ):
        if any(figure.title == title for figure in figures):
            continue
        data, ends = [], []
        for variant in comparison.variants:
            points = _mean_curve(variant, field)
            if not points:
                continue
            ends.append(f"{variant.title} {points[-1][1]:.3f}")
            data.append(
                {
                    **_named(variant),
                    "type": "scatter",
                    "mode": "lines+markers" if len(points) <= 12 else "lines",
                    "x": [x for x, _ in points],
                    "y": [y for _, y in points],
                    "line": {"color": looks.colour(variant), "width": 1.8, "dash": looks.dash(variant)},
                    "marker": {"size": 6, "symbol": looks.symbol(variant)},
                    "hovertemplate": f"{_safe(variant.title)}<br>step %{{x}}: %{{y:.4f}}<extra></extra>",
                }
            )
        if data:
            layout = {"xaxis": {"title": {"text": "step"}, "rangemode": "tozero"}, "yaxis": {**axis}}
            alt = f"{title} of {len(data)} methods over the steps; at the end: {', '.join(ends)}."
            caption = "Mean over the seeds, at each method's chosen learning rate."
            figures.append(Figure(key, title, caption, alt, data, layout, 360, width="half"))
    return Section("curves", "Learning curves", "", figures) if figures else None


def _mean_curve(variant: Variant, field: str) -> list[tuple[float, float]]:
    by_step: dict[float, list[float]] = {}
    for run in variant.runs:
        for point in run.curve:
            step, value = point.get("step"), point.get(field)
            if isinstance(step, (int, float)) and isinstance(value, (int, float)) and math.isfinite(value):
                by_step.setdefault(float(step), []).append(float(value))
    # Seeds that stopped early must not pull the end of the mean towards themselves.
    most = max((len(values) for values in by_step.values()), default=0)
    return [(step, statistics.fmean(v)) for step, v in sorted(by_step.items()) if len(v) == most]


def _rates(comparison: Comparison, looks: Looks) -> Section | None:
    by = comparison.chosen_by
    searched = [v for v in comparison.variants if sum(by in run.validation for run in v.search) > 1]
    if not searched:
        return None
    data: list[Spec] = []
    for variant in searched:
        runs = [run for run in variant.search if by in run.validation]
        data.append(
            {
                **_named(variant),
                "type": "scatter",
                "mode": "lines+markers",
                "x": [run.lr for run in runs],
                "y": [run.validation[by] for run in runs],
                "line": {"color": looks.colour(variant), "width": 1.5, "dash": looks.dash(variant)},
                "marker": {
                    "size": [11 if run.lr == variant.lr else 7 for run in runs],
                    "symbol": [looks.symbol(variant) + ("" if run.lr == variant.lr else "-open") for run in runs],
                    "color": looks.colour(variant),
                    "opacity": 1,
                },
                "hovertemplate": f"{_safe(variant.title)}<br>rate %{{x:.2g}}: %{{y:.4f}}<extra></extra>",
            }
        )
    tried = [run.lr for v in searched for run in v.search if run.lr]
    border = [v.title for v in searched if v.rate_at_border]
    text = "Filled: the rate that was chosen, on validation alone."
    if border:
        text += f" Chosen at the border of what was tried, so that a better one may lie beyond: {', '.join(border)}."
    layout = {
        "xaxis": {"type": "log", "title": {"text": "learning rate"}, **_decades(tried)},
        "yaxis": {
            **_metric_axis(
                comparison, [run.validation[by] for v in searched for run in v.search if by in run.validation]
            ),
            "title": {"text": f"validation {by.replace('_', ' ')}"},
        },
    }
    alt = "Chosen rates: " + ", ".join(f"{v.title} {v.lr:g}" for v in searched if v.lr) + "."
    figure = Figure("rates", "Learning rates tried", "", alt, data, layout, 360)
    return Section("rates", "Learning rates", text, [figure])


def _decades(values: Sequence[float]) -> Spec:
    pad = 0.08
    ends = [math.log10(min(values)) - pad, math.log10(max(values)) + pad]
    if len(set(values)) <= 5:
        return {"tickvals": sorted(set(values)), "ticktext": [f"{v:g}" for v in sorted(set(values))], "range": ends}
    low, high = math.floor(ends[0]), math.ceil(ends[1])
    few = high - low <= 2
    marks = [n * 10.0**e for e in range(low, high + 1) for n in ((1, 2, 5) if few else (1,))]
    return {"tickvals": marks, "ticktext": [f"{m:g}" for m in marks], "range": ends}


# -- ablations --------------------------------------------------------------------------------------------------------


def _sizes(comparison: Comparison, looks: Looks) -> Section | None:
    families: dict[tuple[Any, ...], list[tuple[float, Variant]]] = {}
    for variant in comparison.scored:
        key = next((key for key in SIZES if key in variant.method), None)
        if key is not None and isinstance(variant.method[key], (int, float)):
            rest = tuple(sorted((k, repr(v)) for k, v in variant.method.items() if k != key))
            families.setdefault((key, *rest), []).append((float(variant.method[key]), variant))
    shown = {key: sorted(v, key=lambda pair: pair[0]) for key, v in families.items() if len(v) > 1}
    if not shown:
        return None
    data, told = [], []
    for members in shown.values():
        first = members[0][1]
        name = _without_size(first)
        told.append(f"{name}: " + ", ".join(f"{x:g} {comparison.shown(v.mean)}" for x, v in members))
        data.append(
            {
                "name": name,
                "type": "scatter",
                "mode": "lines+markers",
                "x": [x for x, _ in members],
                "y": [v.mean for _, v in members],
                "error_y": {
                    "type": "data",
                    "array": [v.standard_error or 0 for _, v in members],
                    "thickness": 1.2,
                    "width": 3,
                },
                "line": {"color": looks.colour(first), "width": 1.8},
                "marker": {"size": 9, "symbol": looks.symbol(first)},
                "hovertemplate": [
                    f"{_safe(v.title)}<br>{comparison.shown(v.mean)} {comparison.shown_error(v.standard_error)}<br>"
                    f"{count(v.average('trainable_parameters') or 0)} trained numbers<extra></extra>"
                    for _, v in members
                ],
                "showlegend": True,
            }
        )
    marks = sorted({x for members in shown.values() for x, _ in members})
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": "rank or block size" if any(k[0] != "r" for k in shown) else "rank"},
            "tickvals": marks,
            "ticktext": [f"{m:g}" for m in marks],
            "range": [math.log10(marks[0]) - 0.1, math.log10(marks[-1]) + 0.1],
        },
        "yaxis": {**_metric_axis(comparison), "title": {"text": f"test {_metric(comparison)}"}},
        "showlegend": len(shown) > 1,
    }
    figure = Figure(
        "sizes",
        "Quality over the rank",
        "Mean of the seeds with one standard error.",
        "; ".join(told) + ".",
        data,
        layout,
        360,
    )
    return Section("ranks", "Rank sensitivity", "", [figure])


def _without_size(variant: Variant) -> str:
    key = next(key for key in SIZES if key in variant.method)
    return variant.title.replace(f" {SIZES[key]}={variant.method[key]}", "", 1)


def _vectors(comparison: Comparison, looks: Looks) -> Section | None:
    families: dict[tuple[Any, ...], list[tuple[str, Variant]]] = {}
    for variant in comparison.scored:
        if variant.name not in ("psoft", "psoft_so"):
            continue
        options = dict(variant.method)
        both = variant.name == "psoft"
        alpha, beta = options.pop("psoft_mag_a", both), options.pop("psoft_mag_b", both)
        free = not options.pop("psoft_orth", True)
        options.pop("name", None)
        vectors = {(False, False): "none", (True, False): "α", (False, True): "β", (True, True): "α and β"}[alpha, beta]
        what = ("free R" + ("" if vectors == "none" else f", {vectors}")) if free else vectors
        families.setdefault(tuple(sorted((k, repr(v)) for k, v in options.items())), []).append((what, variant))
    found = [members for members in families.values() if len({what for what, _ in members}) > 1]
    if not found:
        return None
    members = max(found, key=len)
    order = ["none", "α", "β", "α and β"]
    members = sorted(dict(members).items(), key=lambda pair: (pair[0] not in order, pair[0]))
    members.sort(key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
    data: list[Spec] = []
    for column, (what, variant) in enumerate(members):
        data.append(
            {
                **_named(variant),
                "type": "scatter",
                "mode": "markers",
                "x": [column + o for o in _spread(len(variant.scores))],
                "y": variant.scores,
                "marker": {"size": 7, "color": looks.colour(variant), "symbol": "circle-open", "line": {"width": 1.5}},
                "hovertemplate": f"{what}<br>%{{y:.4f}}<extra></extra>",
            }
        )
        data.append(
            {
                **_mean_point(
                    comparison,
                    looks,
                    variant,
                    "y",
                    what,
                    f"<br>{count(variant.average('trainable_parameters') or 0)} trained numbers",
                ),
                "x": [column],
            }
        )
    layout = {
        "xaxis": {
            "tickvals": list(range(len(members))),
            "ticktext": [what for what, _ in members],
            "range": [-0.6, len(members) - 0.4],
            "showgrid": False,
            "title": {"text": "trained besides the rotation"},
        },
        "yaxis": {**_metric_axis(comparison), "title": {"text": f"test {_metric(comparison)}"}},
    }
    alt = "; ".join(
        f"{what}: {comparison.shown(v.mean)} {comparison.shown_error(v.standard_error)}" for what, v in members
    )
    caption = "Circles: seeds; diamonds: their mean with one standard error."
    figure = Figure("vectors", "PSOFT with and without its vectors", caption, alt + ".", data, layout, 340)
    text = "None is the strict method, which keeps angles and norms; α and β scale the principal directions."
    return Section("vectors", "Tunable vectors", text, [figure])


def _spread(number: int) -> list[float]:
    return [0.0] if number < 2 else [0.24 * i / (number - 1) - 0.12 for i in range(number)]


# -- geometry ---------------------------------------------------------------------------------------------------------


def _geometry(comparison: Comparison, looks: Looks) -> Section | None:
    measured = [(variant, geometry) for variant in comparison.variants if (geometry := variant.geometry)]
    if not measured:
        return None
    figures = _maps(measured) + _rotations(measured, looks)
    if not figures:
        return None
    text = (
        "Strict methods keep every norm and every angle between two rows of the weight that they turn; relaxed ones "
        "move them. Heat maps are of the layer that changed most."
    )
    return Section("geometry", "Geometry", text, figures)


_FRAME = {
    "showgrid": False,
    "showticklabels": False,
    "ticks": "",
    "showline": True,
    "mirror": True,
    "constrain": "domain",
}


def _maps(measured: Sequence[tuple[Variant, Mapping[str, Any]]]) -> list[Figure]:
    figures = []
    for number, (variant, geometry) in enumerate(_telling(measured)):
        shown = next(iter(geometry.get("heat_maps") or ()), None)
        if not isinstance(shown, dict) or not shown.get("before"):
            continue
        count_ = len(shown["rows"])
        before, after = _square(shown["before"], count_), _square(shown["after"], count_)
        change = [
            [None if a is None or b is None else a - b for a, b in zip(x, y, strict=True)]
            for x, y in zip(after, before, strict=True)
        ]
        flat = [*shown["before"], *shown["after"]]
        low, high = math.floor(min(flat)), math.ceil(max(flat))
        most = max(abs(a - b) for a, b in zip(shown["after"], shown["before"], strict=True))
        row: Mapping[str, Any] = next((r for r in geometry["layers"] if r["module"] == shown["module"]), {})
        moved = row.get("angles_moved", {}).get("largest", most)
        kind = "strict" if geometry.get("strict") else "relaxed"
        weight = "principal weight P V" if geometry.get("subspaces") else "weight"
        name, layer = f"{variant.title}, {kind}", _layer(shown["module"])
        told = f"of {count_} rows of the {weight} in {layer}"
        reach = max(1.0, math.ceil(most))
        for key, title, values, scale in (
            ("before", "before training", before, _sequential(low, high)),
            ("after", "after training", after, _sequential(low, high)),
            ("change", "after − before", change, _diverging(reach)),
        ):
            about = f"{layer}; no pair of rows moved by more than {moved:.2g}°." if key == "change" else f"{layer}."
            figures.append(
                Figure(
                    f"map-{number}-{key}",
                    f"{name}: {title}",
                    about,
                    f"Heat map of the pairwise angles {told}, {title}, for {name}. "
                    f"Angles from {low}° to {high}°; the largest change is {moved:.2g}°.",
                    [
                        {
                            "type": "heatmap",
                            "z": values,
                            "xgap": 0.5,
                            "ygap": 0.5,
                            **scale,
                            "hovertemplate": "rows %{y} and %{x}: %{z:.2f}°<extra></extra>",
                        }
                    ],
                    {
                        "xaxis": {**_FRAME},
                        "yaxis": {**_FRAME, "autorange": "reversed", "scaleanchor": "x"},
                        "margin": {"l": 4, "r": 4, "t": 6, "b": 6},
                    },
                    290,
                    width="third",
                )
            )
    return figures


def _telling(measured: Sequence[tuple[Variant, Mapping[str, Any]]]) -> list[tuple[Variant, Mapping[str, Any]]]:
    """A strict and a relaxed one, first of those on principal subspaces, then of those on whole weights."""
    chosen: dict[tuple[bool, bool], tuple[Variant, Mapping[str, Any]]] = {}
    for variant, geometry in measured:
        chosen.setdefault((not geometry.get("subspaces"), not geometry.get("strict")), (variant, geometry))
    order = sorted(chosen)
    return [chosen[key] for key in order if not key[0] or not any(not k[0] for k in order)][:_MOST_MAPS]


def _square(pairs: Sequence[float], number: int) -> list[list[float | None]]:
    table: list[list[float | None]] = [[None] * number for _ in range(number)]
    values = iter(pairs)
    for i in range(number):
        for j in range(i + 1, number):
            table[i][j] = table[j][i] = next(values)
    return table


def _sequential(low: float, high: float) -> Spec:
    return {"colorscale": "Cividis", "zmin": low, "zmax": high, "colorbar": _bar()}


def _diverging(reach: float) -> Spec:
    return {
        "colorscale": [[0, "#3b6fc4"], [0.5, "@panel"], [1, "#c2492e"]],
        "zmin": -reach,
        "zmax": reach,
        "colorbar": _bar(),
    }


def _bar() -> Spec:
    return {"thickness": 10, "ticksuffix": "°", "outlinewidth": 0, "nticks": 5}


def _layer(module: str) -> str:
    """encoder.layer.3.output.dense as block 3, output.dense."""
    found = _BLOCK.search(module)
    return f"block {found[1]}, {module[found.end() :]}" if found else module


_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def _rotations(measured: Sequence[tuple[Variant, Mapping[str, Any]]], looks: Looks) -> list[Figure]:
    figures = []
    for field in ("largest", "mean"):
        title = f"{field.capitalize()} rotation angle, layer by layer"
        data: list[Spec] = []
        told: list[str] = []
        modules: list[str] = []
        for variant, geometry in measured:
            rows = [r for r in geometry["layers"] if r.get("rotation")]
            if not rows:
                continue
            names = [r["module"] for r in geometry["layers"]]
            modules = names if len(names) > len(modules) else modules
            values = [float(r["rotation"][field]) for r in rows]
            told.append(f"{variant.title} up to {max(values):.1f}°")
            data.append(
                {
                    **_named(variant),
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": [names.index(r["module"]) for r in rows],
                    "y": values,
                    "line": {"color": looks.colour(variant), "width": 1.2, "dash": looks.dash(variant)},
                    "marker": {"size": 5, "symbol": looks.symbol(variant)},
                    "hovertemplate": [
                        f"{_safe(variant.title)}<br>{_layer(r['module'])}<br>%{{y:.2f}}°<extra></extra>" for r in rows
                    ],
                }
            )
        if data:
            layout = {
                "xaxis": {**_blocks(modules), "title": {"text": "layer, by block of the model"}},
                "yaxis": {"ticksuffix": "°", "rangemode": "tozero"},
            }
            figures.append(
                Figure(f"rotation-{field}", title, "", f"{title}: {', '.join(told)}.", data, layout, 330, width="half")
            )
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


# -- shared -----------------------------------------------------------------------------------------------------------


def _mean_point(comparison: Comparison, looks: Looks, variant: Variant, axis: str, what: str, more: str = "") -> Spec:
    """A method's mean with its standard error along `axis`; where it lies on the other axis is left to the caller."""
    return {
        **_named(variant),
        "type": "scatter",
        "mode": "markers",
        axis: [variant.mean],
        "marker": {"size": 11, "color": looks.colour(variant), "symbol": "diamond"},
        f"error_{axis}": {
            "type": "data",
            "array": [variant.standard_error or 0],
            "thickness": 3,
            "width": 5,
            "color": looks.colour(variant),
        },
        "hovertemplate": f"{what}<br>mean {comparison.shown(variant.mean)} "
        f"{comparison.shown_error(variant.standard_error)}{more}<extra></extra>",
    }


def _named(variant: Variant) -> Spec:
    return {"name": variant.title, "meta": variant.title}


def _metric(comparison: Comparison) -> str:
    return comparison.metric.replace("_", " ")


def _metric_axis(comparison: Comparison, values: Sequence[float | None] = ()) -> Spec:
    """An axis of scores; where all `values` are alike, one that does not reach as far as plotly's would."""
    axis: Spec = {"tickformat": "~%" if comparison.percent else ".3~f"}
    if len(set(values)) == 1 and values[0] is not None:
        axis["range"] = [values[0] - 0.05, values[0] + 0.05]
    return axis


def _safe(text: str) -> str:
    """For plotly, which reads a few tags in text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def colours_of(spec: Any) -> Iterator[str]:
    """Every colour that a figure leaves to the page, as "@ink"."""
    if isinstance(spec, str) and spec.startswith("@"):
        yield spec
    elif isinstance(spec, Mapping):
        for value in spec.values():
            yield from colours_of(value)
    elif isinstance(spec, (list, tuple)):
        for value in spec:
            yield from colours_of(value)
