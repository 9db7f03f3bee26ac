"""What quality costs: scores against parameters, memory and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from isotune.experiments.outcome import MethodResult
from isotune.report.columns import count, duration, pareto, size
from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import axis, error, hover, marked, marks, safe, scores
from isotune.report.results import Comparison

Show = Callable[[float], str]
Point = tuple[float, float, MethodResult]

_COSTS: tuple[tuple[str, str, Show, str], ...] = (
    ("trainable_parameters", "trainable parameters", count, "parameters"),
    ("peak_memory_bytes", "peak memory of training", size, "memory"),
    ("kept_bytes", "kept for backward", size, "kept"),
    ("train_seconds", "training time", duration, "time"),
)


def costs(comparison: Comparison, looks: Looks) -> Section | None:
    """The score against each cost, with the Pareto front."""
    figures, missing = [], []
    for field, name, show, key in _COSTS:
        found = [(variant.average(field), variant.mean, variant) for variant in comparison.scored]
        points = [(cost, score, v) for cost, score, v in found if cost is not None and score is not None]
        # A head learns from features that are computed once: its memory and time are not those of a training.
        heads = [] if field == "trainable_parameters" else [point for point in points if point[2].name == "head"]
        heads = heads if len(heads) < len(points) else []
        if shown := [point for point in points if point not in heads]:
            aside = ", ".join(f"{v.title} ({show(cost)}, {comparison.shown(score)})" for cost, score, v in heads)
            caption = f"Not shown: {aside}, as it trains on features computed once." if aside else ""
            figures.append(_against(comparison, looks, shown, name, show, key, caption))
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


def _against(
    comparison: Comparison, looks: Looks, points: list[Point], name: str, show: Show, key: str, caption: str
) -> Figure:
    front = pareto(points, higher_is_better=comparison.higher_is_better)
    members = [variant for _, _, variant in front]
    values = [cost for cost, _, _ in points]
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
        on, colour = variant in members, looks.colour(variant)
        symbol = looks.symbol(variant) + ("" if on else "-open")
        marker = {"size": 12 if on else 10, "color": colour, "symbol": symbol, "line": {"width": 0 if on else 2}}
        bars = error([variant.standard_error or 0], 1.2, 3, colour)
        text = hover(safe(variant.title), show(cost), comparison.shown(score, variant.standard_error))
        data.append(marks(variant, [cost], [score], text, marker=marker, error_y=bars))
    ends = [score + sign * (v.standard_error or 0.0) for _, score, v in points for sign in (-1, 1)]
    logarithmic = min(values) > 0 and max(values) / min(values) > 8
    layout = {
        "xaxis": axis(name, **_ticks(values, show, logarithmic=logarithmic)),
        "yaxis": scores(comparison, f"test {comparison.metric_name}", ends),
        "meta": {"labels": _labels(points, members, logarithmic=logarithmic)},
    }
    listed = ", ".join(f"{v.title} ({show(cost)}, {comparison.shown(score)})" for cost, score, v in front)
    alt = f"{comparison.metric_name} against {name} of {len(points)} methods. On the Pareto front: {listed}."
    return Figure(key, f"Against {name}", caption, alt, data, layout, 340, width="half")


def _labels(points: Sequence[Point], front: Sequence[MethodResult], *, logarithmic: bool) -> list[Spec]:
    """The names of the points, those of the front first; the page's script finds a place for each that has one."""
    ordered = sorted(points, key=lambda point: (point[2] not in front, point[0]))
    return [
        {
            "x": math.log10(cost) if logarithmic else cost,
            "y": score,
            "text": safe(variant.title),
            "method": variant.title,
            "front": variant in front,
        }
        for cost, score, variant in ordered
    ]


_MINUTE, _HOUR = 60.0, 3600.0
_MARKS: dict[Show, list[float]] = {
    count: [n * 10.0**e for e in range(14) for n in (1, 2, 5)],
    size: [2.0**e for e in range(50)],
    duration: [n / 10**e for e in (3, 2, 1) for n in (1, 2, 5)]
    + [u * n for u in (1.0, _MINUTE) for n in (1, 2, 5, 10, 20, 30)]
    + [_HOUR * n * 10**e for e in range(4) for n in (1, 2, 5)],
}
"""By the function that writes a number, the numbers that look round when it has written them."""


def _ticks(values: Sequence[float], show: Show, *, logarithmic: bool) -> Spec:
    """An axis with round ticks."""
    low, high = min(values), max(values)
    if low == high:
        return {"tickvals": [low], "ticktext": [show(low)]}
    if not logarithmic:
        low = min(low, 0.0) if low < 0.5 * high else low
        beyond = 10.0 ** math.ceil(math.log10((high - low) / 4))
        step = next((mark for mark in _MARKS[show] if (high - low) / mark <= 4), beyond)
        places = [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
        pad = 0.12 * (high - low or step)
        places = [place for place in places if low - 0.9 * pad <= place <= high + 0.5 * pad] or [low]
        return marked(places, _texts(places, show), [low - pad, high + pad])
    inside = [mark for mark in _MARKS[show] if low / 1.2 <= mark <= high * 1.2] or [low, high]
    decades = [mark for mark in inside if math.log10(mark).is_integer()]
    if show is count and len(decades) > 2:
        inside = decades
    places = inside[:: -(-len(inside) // 5)]
    ends = math.log10(low), math.log10(high)
    pad = 0.08 * (ends[1] - ends[0]) + 0.07
    texts = [_texts([place], show)[0] for place in places]
    return marked(places, texts, [ends[0] - pad, ends[1] + pad], type="log")


_UNITS: dict[Show, tuple[tuple[float, str], ...]] = {
    count: ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, "")),
    size: ((2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"), (1.0, " B")),
    duration: ((_HOUR, " h"), (_MINUTE, " min"), (1.0, " s")),
}


def _texts(places: Sequence[float], show: Show) -> list[str]:
    """Ticks in the largest unit in which one decimal is enough for each, so that no two read alike."""
    units = [(unit, name) for unit, name in _UNITS[show] if unit <= max(places)] or [_UNITS[show][-1]]
    exact = (one for one in units if all(math.isclose(x := 10 * place / one[0], round(x)) for place in places))
    unit, name = next(exact, units[-1])
    return [f"{place / unit:,.6g}{name}" for place in places]
