"""The course of training, and the search for the learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from isotune.experiments.outcome import MethodResult
from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import axis, hover, line, marked, safe, scores, with_chosen
from isotune.report.results import Comparison


def curves(comparison: Comparison, looks: Looks) -> Section | None:
    """Validation score and losses over the course of training."""
    figures: list[Figure] = []
    steps = {variant.title: total for variant in comparison.variants if (total := _steps(variant))}
    score = f"validation_{comparison.metric}"
    wanted = [("curve-score", score, f"Validation {comparison.metric_name}", scores(comparison, ""))]
    if comparison.metric != "loss":
        wanted.append(("curve-validation", "validation_loss", "Validation loss", {}))
    wanted.append(("curve-loss", "loss", "Training loss", {}))
    for key, field, title, vertical in wanted:
        data, ends = [], []
        for variant in comparison.variants:
            points = _mean_curve(variant, field)
            if points:
                ends.append(f"{variant.title} {points[-1][1]:.3f}")
                mode = "lines+markers" if len(points) <= 12 else "lines"
                total = steps.get(variant.title, 1.0)
                texts = [hover(safe(variant.title), f"step {step:,.0f} of {total:,.0f}: {y:.4f}") for step, y in points]
                shares = [(step / total, y) for step, y in points]
                data.append(line(looks, variant, shares, texts, width=1.8, size=6, mode=mode))
        if data:
            layout = {"xaxis": axis("share of training", **_SHARES), "yaxis": vertical}
            alt = f"{title} of {len(data)} methods over the course of training; at the end: {', '.join(ends)}."
            figures.append(Figure(key, title, "", alt, data, layout, 340, width="half"))
    text = f"Mean over the seeds, at each method's chosen learning rate. {_lengths(steps)}"
    return Section("curves", "Learning curves", text, figures) if figures else None


_SHARES = marked((0, 0.25, 0.5, 0.75, 1), ("0", "25%", "50%", "75%", "100%"), (0, 1.015))


def _steps(variant: MethodResult) -> float:
    """The steps of a method's longest run."""
    return max((point.get("step", 0.0) for run in variant.runs for point in run.curve), default=0.0)


def _lengths(steps: Mapping[str, float]) -> str:
    """How many steps a training has: the usual number, and whose differs."""
    if not steps:
        return ""
    usual = statistics.mode(steps.values())
    others = [f"{title} {number:,.0f}" for title, number in steps.items() if number != usual]
    return f"A training has {usual:,.0f} steps" + (f" ({', '.join(others)})." if others else ".")


def _mean_curve(variant: MethodResult, field: str) -> list[tuple[float, float]]:
    by_step: dict[float, list[float]] = {}
    for run in variant.runs:
        for point in run.curve:
            if "step" in point and field in point:
                by_step.setdefault(point["step"], []).append(point[field])
    # Seeds that stopped early must not pull the end of the mean towards themselves.
    most = max((len(values) for values in by_step.values()), default=0)
    return [(step, statistics.fmean(v)) for step, v in sorted(by_step.items()) if len(v) == most]


def rates(comparison: Comparison, looks: Looks) -> Section | None:
    """The validation score over the learning rates that were tried."""
    by = comparison.chosen_by
    searched: list[tuple[MethodResult, list[tuple[float, float]]]] = []
    for variant in comparison.variants:
        points = [(r.lr, r.validation[by]) for r in variant.search if r.lr is not None and by in r.validation]
        if len(points) > 1:
            searched.append((variant, points))
    if not searched:
        return None
    data: list[Spec] = []
    for variant, points in searched:
        trace = line(looks, variant, points, hover(safe(variant.title), "rate %{x:.2g}: %{y:.4f}"), width=1.5, size=7)
        data.append(with_chosen(trace, [lr == variant.lr for lr, _ in points]))
    border = [variant.title for variant, _ in searched if variant.rate_at_border]
    text = "Filled: the rate that was chosen, on validation alone."
    if border:
        text += f" Chosen at the border of what was tried, so that a better one may lie beyond: {', '.join(border)}."
    every = [point for _, points in searched for point in points]
    layout = {
        "xaxis": axis("learning rate", type="log", **_decades([lr for lr, _ in every])),
        "yaxis": scores(comparison, f"validation {by.replace('_', ' ')}", [score for _, score in every]),
    }
    alt = "Chosen rates: " + ", ".join(f"{v.title} {v.lr:g}" for v, _ in searched if v.lr) + "."
    figure = Figure("rates", "Learning rates tried", "", alt, data, layout, 360)
    return Section("rates", "Learning rates", text, [figure])


def _decades(values: Sequence[float]) -> Spec:
    pad = 0.08
    ends = [math.log10(min(values)) - pad, math.log10(max(values)) + pad]
    places = sorted(set(values))
    if len(places) > 5:
        low, high = math.floor(ends[0]), math.ceil(ends[1])
        few = high - low <= 2
        places = [n * 10.0**e for e in range(low, high + 1) for n in ((1, 2, 5) if few else (1,))]
    return marked(places, [f"{place:g}" for place in places], ends)
