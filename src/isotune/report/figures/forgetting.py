"""What the methods forgot, at the end and on the way."""

from __future__ import annotations

import statistics

from isotune.experiments.records import Forgetting
from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import axis, circles, hover, line, marks, names, safe, scores, with_chosen
from isotune.report.paths import AtOneScore, at_one_score, at_one_score_by_rate, by_rate, mean_path, rate_path, sign
from isotune.report.results import Comparison

_SHOWN = 0.4
"""The share of the most that was learnt, from the top, which the picture of the rates shows."""


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
    more = [*_course(comparison, looks), *_by_rate(comparison, looks)]
    about_it = f"How much worse the model became at text it was not trained on. {_meaning(about[0])}".rstrip()
    return Section("forgetting", "Forgetting", about_it, [figure, *more], named=not more)


def _meaning(about: Forgetting) -> str:
    """What a reader should think of 0.3."""
    if about.unit == "nats a token":
        return "In nats a token: 0.3 makes the perplexity 1.35 times as high, as e to the power of 0.3 is 1.35."
    if about.apart:
        share = 0.3 / about.apart
        return (
            "A cosine distance is 0 for no change, and 2 at most. Two different passages lie "
            f"{about.apart:.2f} apart in the base model, and 0.3 is {share:.0%} of that: who uses the embeddings "
            "themselves will notice; a task with a head of its own need not suffer."
        )
    return ""


def _course(comparison: Comparison, looks: Looks) -> list[Figure]:
    """What was forgotten on the way to each score, as lines from the untrained model on."""
    found = at_one_score(comparison)
    if found is None:
        return []
    data = []
    for variant in comparison.variants:
        if variant.label in found.forgotten:
            path = mean_path(variant, comparison.chosen_by)
            texts = [hover(safe(variant.title), f"{score:.4f} at {change:+.4f}") for score, change in path]
            data.append(line(looks, variant, [(change, score) for score, change in path], texts, width=1.8, size=6))
    caption = (
        "From the untrained model on, means over the seeds; further up and left is better. At the best score on "
        f"validation that all of them reach, {_told(comparison, found)}."
    )
    alt = f"Forgetting along the training of {len(data)} methods."
    title = "Learnt and forgotten along the training"
    return [Figure("course", title, caption, alt, data, _axes(comparison), 380)]


def _by_rate(comparison: Comparison, looks: Looks) -> list[Figure]:
    """What was forgotten for each score at every rate that was tried, as lines from the untrained model on."""
    found = at_one_score_by_rate(comparison)
    if found is None:
        return []
    data, better = [], sign(comparison)
    shown = [variant for variant in comparison.variants if variant.label in found.forgotten]
    paths = [rate_path(variant, comparison.chosen_by) for variant in shown]
    for variant, path in zip(shown, paths, strict=True):
        ends = by_rate(variant, comparison.chosen_by)
        texts = ["untrained", *(f"rate {run.lr:g}" for run in ends)]
        texts = [hover(safe(variant.title), f"{t}: {s:.4f} at {f:+.4f}") for t, (s, f) in zip(texts, path, strict=True)]
        trace = line(looks, variant, [(change, score) for score, change in path], texts, width=1.5, size=7)
        data.append(with_chosen(trace, [False, *(run.lr == variant.lr for run in ends)]))
    every = [point for path in paths for point in path]
    start, best = (pick(every, key=lambda point: better * point[0])[0] for pick in (min, max))
    low, pad = best - _SHOWN * (best - start), 0.04 * abs(best - start)
    tops = [max(path, key=lambda point: better * point[0]) for path in paths]
    layout = _axes(comparison)
    layout["yaxis"]["range"] = sorted((low, best + better * pad))
    layout["xaxis"]["range"] = [0.0, 1.15 * max(change for _, change in tops)]
    caption = (
        "Each point is a whole training at another learning rate, one seed each; filled: the rate that was chosen. "
        f"Further up and left is better; what learnt less than {1 - _SHOWN:.0%} of the most is not in the picture. At "
        f"the best score on validation that all of them reach at some rate, {_told(comparison, found)}."
    )
    alt = f"Score on validation against forgetting of {len(data)} methods at their learning rates."
    return [Figure("trade", "Learnt and forgotten by learning rate", caption, alt, data, layout, 420)]


def _told(comparison: Comparison, found: AtOneScore) -> str:
    """The score, and what each method had forgotten there, least first."""
    told = []
    for variant in comparison.variants:
        value, error = found.mean(variant.label), found.error(variant.label)
        if value is not None:
            reaching, of = len(found.forgotten[variant.label]), found.of[variant.label]
            few = f" ({reaching} of {of} seeds reach it)" if reaching < of else ""
            told.append(
                (value, f"{variant.title} {value:.3f}" + (f" ± {error:.3f}" if error is not None else "") + few)
            )
    listed = ", ".join(text for _, text in sorted(told))
    return f"{comparison.chosen_by.replace('_', ' ')} {found.level:.3f}, they had forgotten: {listed}"


def _axes(comparison: Comparison) -> Spec:
    return {
        "xaxis": axis("forgotten by then"),
        "yaxis": scores(comparison, f"validation {comparison.chosen_by.replace('_', ' ')}"),
    }
