"""The scores of a training as a small picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isotune.experiments import scores
from isotune.experiments.records import number
from isotune.experiments.resampling import LEVEL
from isotune.whole_files import written_whole

INK, OWN = "#7b8088", "#3f7fd0"
"""Of text, and of the recipe's own method; both stand out from white and from black, as the picture has no ground."""


def draw(metric: str, data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the scores of methods with their errors into a PNG that is 1,280 pixels wide and has no ground.

    The axis reaches from the lowest end of an error bar to the highest, so that a small gain is seen beside its error.

    Args:
        data: what the record says of the data, of which `test` and `majority_accuracy` are shown.
        rows: `title`, `score` as text, `mean`, `trainable_parameters`, and `interval` over the test examples or
            `standard_error` over the seeds; the recipe's own method is the last.
        path: the file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(8, 1.2 + 0.7 * len(rows)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state: charts may be drawn in any process
    axes = figure.subplots()
    for place, row in enumerate(rows):
        color, mean, error = OWN if row is rows[-1] else INK, row["mean"], row.get("standard_error") or 0.0
        low, high = row.get("interval") or (mean - error, mean + error)
        axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(mean, place, "o", color=color, markersize=10)
        axes.text(mean, place - 0.2, row["score"], color=color, weight="bold", ha="center", va="bottom", fontsize=11)
    axes.set_yticks(range(len(rows)), [_named(row) for row in rows])
    axes.set_ylim(len(rows) - 0.6, -0.7)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if metric == "accuracy":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.set_xlabel(_about(metric, data, rows), color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color=INK, alpha=0.3)
    axes.spines[:].set_visible(False)
    with written_whole(path) as partial:
        figure.savefig(partial, transparent=True)


def _named(row: Mapping[str, Any]) -> str:
    trained = row.get("trainable_parameters")
    return str(row["title"]) + ("" if trained is None else f"\n{trained:,.0f} trainable parameters")


def _about(metric: str, data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the axis and the bars show, and what the same answer to everything would score."""
    size, majority = data.get("test"), number(data.get("majority_accuracy"))
    about = f"test {metric.replace('_', ' ')}"
    if any(row.get("interval") for row in rows):
        about += f" with its {LEVEL:.0%} interval" + (f" over {size:,} test examples" if isinstance(size, int) else "")
    elif any(row.get("standard_error") for row in rows):
        about += " with one standard error over the seeds"
    if metric == "accuracy" and majority is not None:
        about += f"\nalways the most frequent class: {scores.score(metric, majority)}"
    return about
