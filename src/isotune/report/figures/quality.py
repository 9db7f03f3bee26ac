"""How good the methods are."""

from __future__ import annotations

from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import circles, error, hover, mean, names, safe, scores, spread
from isotune.report.results import Comparison


def seeds(comparison: Comparison, looks: Looks) -> Section | None:
    """The score of every seed and the mean of each method."""
    shown = comparison.ranked(comparison.scored)[::-1]
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
