"""How good the methods are, and what they forgot."""

from __future__ import annotations

import statistics

from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import axis, circles, error, hover, marks, mean, names, safe, scores, spread
from isotune.report.results import Comparison


def seeds(comparison: Comparison, looks: Looks) -> Section | None:
    """The score of every seed and the mean of each method."""
    shown = sorted(comparison.scored, key=lambda v: v.mean or 0.0, reverse=not comparison.higher_is_better)
    if not shown:
        return None
    data: list[Spec] = []
    for row, variant in enumerate(shown):
        found = [(run, run.score, run.interval) for run in variant.runs if run.score is not None]
        places = [row + offset for offset in spread(len(found), 0.5)]
        texts = [hover(f"{safe(variant.title)}, seed {run.seed}", comparison.shown(score)) for run, score, _ in found]
        points = circles(variant, [score for _, score, _ in found], places, texts, looks.colour(variant))
        if any(ends for _, _, ends in found):
            below = [score - ends[0] if ends else 0 for _, score, ends in found]
            above = [ends[1] - score if ends else 0 for _, score, ends in found]
            points["error_x"] = error(above, 1, 0, "@muted", symmetric=False, arrayminus=below)
        data += [points, mean(comparison, looks, variant, along="x", at=row, text=[safe(variant.title)])]
    reached = [end for v in shown for r in v.runs for end in (r.score, *(r.interval or ())) if end is not None]
    layout = {
        "xaxis": scores(comparison, f"test {comparison.metric_name}", reached),
        "yaxis": names([variant.title for variant in shown]),
    }
    best = comparison.best
    how = next((r.interval_about.described for v in shown for r in v.runs if r.interval_about and r.interval), "")
    whiskers = f" Thin lines are each seed's own interval over the test examples ({how})." if how else ""
    alt = ", ".join(f"{v.title} {comparison.shown(v.mean)}" for v in reversed(shown))
    figure = Figure(
        "seeds",
        f"Test {comparison.metric_name} of every seed",
        f"Each small circle is a seed; the diamond is their mean, with one standard error.{whiskers}",
        f"{len(shown)} methods, best first: {alt}.",
        data,
        layout,
        90 + 30 * len(shown),
    )
    text = "" if best is None else f"Best on average: {best.title}, {comparison.shown(best.mean)}."
    return Section("quality", "Quality", text, [figure], named=True)


def forgetting(comparison: Comparison, looks: Looks) -> Section | None:
    """How much worse each method made the model at other text."""
    found = [(v, change) for v in comparison.variants if (change := v.average("forgetting")) is not None]
    if not found:
        return None
    found.sort(key=lambda pair: pair[1], reverse=True)
    data: list[Spec] = []
    largest = 0.0
    for row, (variant, _) in enumerate(found):
        values = [run.forgetting for run in variant.runs if run.forgetting is not None]
        largest = max(largest, *(abs(value) for value in values))
        text = hover(safe(variant.title), "%{x:+.4f}")
        bar = {"type": "bar", "orientation": "h", "width": 0.62, "marker": {"color": looks.colour(variant)}}
        data.append(marks(variant, [statistics.fmean(values)], [row], text, **bar))
        del data[-1]["mode"]  # bars have none
        data.append(circles(variant, values, [row] * len(values), text, "@ink"))
    # Where nothing was forgotten, as by a head alone, rounding must not fill the axis.
    tiny = {"range": [-0.01, 0.01]} if largest < 1e-3 else {}
    layout = {
        "xaxis": axis("change", zeroline=True, zerolinecolor="@muted", **tiny),
        "yaxis": names([variant.title for variant, _ in found]),
        "barmode": "overlay",
    }
    about = [r.forgetting_about for v, _ in found for r in v.runs if r.forgetting_about and r.forgetting is not None]
    text = next((one.text for one in about if one.text), "")
    figure = Figure(
        "forgetting",
        f"Change of {about[0].measure}",
        "Further left is better. Bars: mean over the seeds; circles: each seed." + (f" Text: {text}." if text else ""),
        "Least first: " + ", ".join(f"{v.title} {change:+.3f}" for v, change in reversed(found)) + ".",
        data,
        layout,
        90 + 30 * len(found),
    )
    about_it = "How much worse the model became at text it was not trained on."
    return Section("forgetting", "Forgetting", about_it, [figure], named=True)
