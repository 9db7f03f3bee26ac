"""What the runs of a method come to together: the chosen rate, the mean of its seeds, and its row of a table."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from isotune.experiments.rates import at_border, best_of
from isotune.experiments.recipe import merit
from isotune.experiments.records import Geometry, Record
from isotune.experiments.registry import entry
from isotune.experiments.resampling import difference


def best_rate(records: Iterable[Record], metric: str) -> float | None:
    """The learning rate of the run that is best on validation, in whichever order they are; None without runs."""
    tried: set[float] = set()
    merits: dict[float, float] = {}
    for record in records:
        if record.lr is not None:
            tried.add(record.lr)
            if not record.lost:
                merits[record.lr] = max(merit(metric, record.validation), merits.get(record.lr, -math.inf))
    return best_of(merits, tried) if merits else None


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of some values; None for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class MethodResult:
    """A method with its options: the runs of its search, and its seeds at the learning rate that was chosen."""

    label: str
    title: str
    """For people, such as PSOFT r=46."""
    method: Mapping[str, Any]
    lr: float | None
    tried: Sequence[float]
    """The learning rates of its search."""
    runs: Sequence[Record]
    """At the chosen rate, one a seed, none that failed."""
    search: Sequence[Record]
    """At every rate tried, none that failed, by rate."""
    failed: str | None
    stopped: Sequence[float] = ()
    """The learning rates whose runs were stopped early, as hopeless."""

    @property
    def name(self) -> str:
        """The method's name in a recipe."""
        return str(self.method.get("name") or self.label.partition(":")[0])

    @property
    def rate_at_border(self) -> bool:
        """Whether the chosen rate is the lowest or highest of several."""
        return at_border(self.lr, self.tried)

    @cached_property
    def scores(self) -> list[float]:
        """The score of every seed."""
        return [run.score for run in self.runs if run.score is not None]

    @property
    def mean(self) -> float | None:
        """The mean of the scores."""
        return self._mean(self.scores)

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean over the seeds; None for a single seed."""
        return standard_error(self.scores)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the score over the draw of the test examples; None for several seeds."""
        return self.runs[0].interval if len(self.runs) == 1 else None

    def average(self, name: str) -> float | None:
        """The mean of a field over the seeds that have it."""
        return self._mean(getattr(run, name) for run in self.runs)

    def part(self, name: str) -> float | None:
        """The mean score on one of several test sets."""
        return self._mean(run.parts.get(name) for run in self.runs)

    @staticmethod
    def _mean(values: Iterable[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return statistics.fmean(found) if found else None

    @property
    def geometry(self) -> Geometry | None:
        """What the first run that has one measured."""
        return next((run.geometry for run in self.runs if run.geometry), None)

    def row(self) -> dict[str, Any]:
        """The method in `comparison.json`: scores by seed, and the means of the measures over its seeds."""
        return {
            "label": self.label,
            "title": self.title,
            "method": dict(self.method),
            "lr": self.lr,
            "lr_tried": list(self.tried),
            "lr_at_border": self.rate_at_border,
            "lr_stopped": list(self.stopped),
            "mean": self.mean,
            "standard_error": self.standard_error,
            "interval": None if self.interval is None else list(self.interval),  # as in the file
            "seeds": len(self.scores),
            "scores": {str(run.seed): run.score for run in self.runs},
            "failed": self.failed,
            "validation_score": self._mean(run.validation.get(run.metric) for run in self.runs),
            "untrained_score": self._mean(run.untrained.get(run.metric) for run in self.runs),
            **{name: self._measure(name) for name in MEASURES},
            "forgetting_unit": next((run.forgetting_about.unit for run in self.runs if run.forgetting_about), None),
        }

    def _measure(self, name: str) -> float | None:
        value = self.average(name)
        return int(value) if value is not None and name.endswith("_parameters") else value


MEASURES = (
    *("trainable_parameters", "adapter_parameters", "head_parameters", "adapter_bytes", "train_seconds"),
    *("tokens_per_second", "peak_memory_bytes", "kept_bytes", "forgetting"),
)
"""What a record says of a run beside its scores; a method's row has the mean of each over its seeds."""


def method_result(
    label: str,
    records: Sequence[Record],
    *,
    method: Mapping[str, Any],
    lr: float | None,
    tried: Iterable[float] | None = None,
    failed: str | None,
) -> MethodResult:
    """What the runs of one method come to.

    Args:
        label: the method's in the comparison.
        records: all its runs that have been done, failed ones included.
        method: its name and options.
        lr: the chosen rate; None while it is not known.
        tried: the rates of its search; by default those that the records have.
        failed: why the method or one of its seeds came to nothing.
    """
    done = [record for record in records if record.failed is None and record.score is not None]
    search = sorted((record for record in done if record.phase == "search"), key=lambda record: record.lr or 0.0)
    chosen = {record.seed: record for record in done if record.lr == lr}
    if tried is None:
        tried = {r.lr for r in records if r.phase == "search" and r.lr is not None}
    return MethodResult(
        label=label,
        title=entry(str(method.get("name", label.partition(":")[0]))).title_of(method),
        method=method,
        lr=lr,
        tried=sorted(tried),
        runs=[chosen[seed] for seed in sorted(chosen)],
        search=search,
        failed=failed,
        stopped=sorted(record.lr for record in records if record.stopped is not None and record.lr is not None),
    )


def reference_of(found: Sequence[MethodResult]) -> MethodResult | None:
    """The method that the others are set against, example by example: the first LoRA; None where there is none."""
    return next((one for one in found if one.name == "lora"), None)


def differences(found: Sequence[MethodResult]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The title of the reference, and by how much each method differs from it, by label, where that can be said.

    On the same seeds and examples; see `resampling.difference`.
    """
    reference = reference_of(found)
    if reference is None:
        return "", {}
    others = {run.seed: run.answers for run in reference.runs if run.answers is not None}
    apart = {}
    for one in found:
        pairs = [(run.answers, others[run.seed]) for run in one.runs if run.answers is not None and run.seed in others]
        if one is not reference and pairs and (value := difference(one.runs[0].metric, pairs)) is not None:
            apart[one.label] = value
    return reference.title, apart


def rows_of(found: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """The rows of `comparison.json`, each with its difference to the reference."""
    title, apart = differences(found)
    return [
        {**one.row(), "difference": {"to": title, **apart[one.label]} if one.label in apart else None} for one in found
    ]


def with_titles(found: Sequence[MethodResult]) -> list[MethodResult]:
    """The same, where methods that differ in what no title says, such as a training setting, have labels for titles."""
    titles = [one.title for one in found]
    return [
        dataclasses.replace(one, title=one.label.replace(":", " ").replace("+", " "))
        if titles.count(one.title) > 1
        else one
        for one in found
    ]
