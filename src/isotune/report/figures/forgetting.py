"""What the methods forgot, at the end and on the way."""

from __future__ import annotations

import statistics

from isotune.experiments.records import Forgetting
from isotune.report.figures.looks import Figure, Looks, Section, Spec
from isotune.report.figures.marks import axis, circles, hover, line, marks, names, safe, scores
from isotune.report.paths import at_one_score, mean_path
from isotune.report.results import Comparison


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
    course = _course(comparison, looks)
    about_it = f"How much worse the model became at text it was not trained on. {_meaning(about[0])}".rstrip()
    return Section("forgetting", "Forgetting", about_it, [figure, *course], named=not course)


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
    data, told = [], []
    for variant in comparison.variants:
        if variant.label not in found.forgotten:
            continue
        path = mean_path(variant, comparison.chosen_by)
        texts = [hover(safe(variant.title), f"{score:.4f} at {change:+.4f}") for score, change in path]
        data.append(line(looks, variant, [(change, score) for score, change in path], texts, width=1.8, size=6))
        value, error = found.mean(variant.label), found.error(variant.label)
        if value is not None:
            reaching = len(found.forgotten[variant.label])
            few = f" ({reaching} of {len(variant.runs)} seeds reach it)" if reaching < len(variant.runs) else ""
            told.append(
                (value, f"{variant.title} {value:.3f}" + (f" ± {error:.3f}" if error is not None else "") + few)
            )
    reached = f"{comparison.chosen_by.replace('_', ' ')} {found.level:.3f}"
    listed = ", ".join(text for _, text in sorted(told))
    caption = (
        "From the untrained model on, means over the seeds; further up and left is better. At the best score on "
        f"validation that all of them reach, {reached}, they had forgotten: {listed}."
    )
    layout = {
        "xaxis": axis("forgotten by then"),
        "yaxis": scores(comparison, f"validation {comparison.chosen_by.replace('_', ' ')}"),
    }
    alt = f"Forgetting along the training of {len(data)} methods."
    return [Figure("course", "Learnt and forgotten along the training", caption, alt, data, layout, 380)]
