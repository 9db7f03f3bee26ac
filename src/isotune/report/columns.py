"""The figures that the table and the page both show of a method, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from isotune.experiments import scores
from isotune.experiments.outcome import MethodResult
from isotune.report.results import Comparison


@dataclass(frozen=True)
class Column:
    """A figure of each method."""

    key: str
    """Its name where a program reads it."""
    title: str
    value: Callable[[MethodResult], float | None]
    show: Callable[[float], str]
    small: Callable[[MethodResult], str] = lambda variant: ""
    """What stands beside it in small print."""
    detail: bool = False
    """Whether it stands beside another figure rather than in a column of its own, where people read it."""
    kind: str = ""
    """Of its head."""


def count(value: float) -> str:
    """A number of things, with separators."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes, in the unit that leaves up to four digits."""
    units = ["B", "KiB", "MiB", "GiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:,.0f} {units[0]}" if units[0] == "B" or abs(value) >= 100 else f"{value:.3g} {units[0]}"


def duration(value: float) -> str:
    """Seconds, or minutes and hours where that is shorter."""
    if value < 100:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    unit, length = ("min", 60.0) if value < 6000 else ("h", 3600.0)
    return f"{value / length:.{1 if value < 10 * length else 0}f} {unit}"


def _average(key: str, title: str, show: Callable[[float], str], **more: Any) -> Column:
    return Column(key, title, lambda variant: variant.average(key), show, **more)


def _adapter_of(variant: MethodResult) -> str:
    """The parameters of the adapter, where others are trained beside it."""
    adapter = variant.average("adapter_parameters")
    return "" if adapter in (None, variant.average("trainable_parameters")) else f"adapter {adapter:,.0f}"


COLUMNS = (
    _average("trainable_parameters", "Trainable parameters", count, small=_adapter_of),
    _average("adapter_parameters", "Parameters of the adapter", count, detail=True),
    _average("adapter_bytes", "File", size),
    _average("train_seconds", "Training time", duration),
    _average("tokens_per_second", "Tokens a second", count),
    _average("peak_memory_bytes", "Peak memory", size),
    _average("kept_bytes", "Kept for backward", size),
    _average("forgetting", "Forgetting", lambda value: f"{round(value, 3) + 0.0:+.3f}"),
)
"""After the score; a comparison shows those of which any method has a value."""


def columns_of(comparison: Comparison, *, details: bool = False) -> list[Column]:
    """The columns of which any method of a comparison has a value."""
    columns = (*(_part(comparison, name) for name in comparison.parts), _difference(comparison), *COLUMNS)
    found = [c for c in columns if any(c.value(variant) is not None for variant in comparison.variants)]
    return [column for column in found if details or not column.detail]


def _part(comparison: Comparison, name: str) -> Column:
    """The score on one of several test sets, and what the paper reports for it."""

    def small(variant: MethodResult) -> str:
        beside = comparison.paper_of_part(name).get(variant.name)
        return "" if beside is None else f"paper {comparison.shown(beside.score)}"

    value = partial(MethodResult.part, name=name)
    return Column(f"test_{name}", name.replace("_", " "), value, comparison.shown, small)


def _difference(comparison: Comparison) -> Column:
    """By how much a method scores higher than the reference, and the ends of the interval."""
    to, apart = comparison.differences

    def ends(variant: MethodResult) -> str:
        low, high = (scores.plain(comparison.metric, apart[variant.label][end], "+") for end in ("low", "high"))
        return f"{low} to {high}"

    return Column(
        "difference",
        f"Difference to {to}",
        lambda variant: apart.get(variant.label, {}).get("mean"),
        partial(scores.difference, comparison.metric),
        ends,
        kind="difference",
    )


def pareto(points: Iterable[tuple[float, float, Any]], *, higher_is_better: bool) -> list[tuple[float, float, Any]]:
    """The points (cost, score, …) that no other beats in both, by cost; of equal ones the first."""
    sign = 1.0 if higher_is_better else -1.0
    front: list[tuple[float, float, Any]] = []
    for point in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * point[1] > sign * front[-1][1]:
            front.append(point)
    return front


@dataclass(frozen=True)
class Cell:
    """A figure in a table."""

    text: str
    value: float | None = None
    """The number that it stands for, by which a table is sorted."""
    small: str = ""
    """What stands beside it in small print."""
    mark: str = ""
    """"best", "near" for what is within one standard error of the best, or nothing."""


@dataclass(frozen=True)
class Head:
    """The head of a column."""

    title: str
    kind: str = ""
    """"score", "seeds", "paper", "difference", "rate", or nothing."""


def table_of(comparison: Comparison) -> tuple[list[Head], list[tuple[MethodResult, list[Cell]]]]:
    """The table that Markdown, LaTeX and the page show: heads, and a row of cells for each method, the best first."""
    columns, paper = columns_of(comparison), comparison.paper
    heads = [Head(f"Test {comparison.metric_name}", "score"), Head("Seeds", "seeds")]
    heads += [Head(next(iter(paper.values())).model, "paper")] if paper else []
    heads += [*(Head(column.title, column.kind) for column in columns), Head("Learning rate", "rate")]
    rows = []
    for variant in comparison.ranked(comparison.variants):
        cells = [score_of(comparison, variant), Cell(str(len(variant.scores)), len(variant.scores))]
        if paper:
            beside = paper.get(variant.name)
            shown = Cell(comparison.shown(beside.score), beside.score, beside.method) if beside else Cell("–")
            cells.append(shown)
        for column in columns:
            value = column.value(variant)
            cells.append(Cell("–") if value is None else Cell(column.show(value), value, column.small(variant)))
        border = "at the border" if variant.rate_at_border else ""
        cells.append(Cell("–" if variant.lr is None else f"{variant.lr:g}", variant.lr, border))
        rows.append((variant, cells))
    return heads, rows


def score_of(comparison: Comparison, variant: MethodResult) -> Cell:
    """The mean score of a method, its standard error beside it."""
    if variant.mean is None:
        return Cell("failed" if variant.failed else "not run")
    mark = "best" if variant is comparison.best else "near" if comparison.near_best(variant) else ""
    error = scores.spread_of(comparison.metric, variant.standard_error)
    return Cell(comparison.shown(variant.mean), variant.mean, error, mark)
