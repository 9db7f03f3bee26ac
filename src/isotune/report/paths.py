"""What each method forgot on its way: the course of a training as scores against forgetting."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isotune.experiments.outcome import MethodResult, standard_error
from isotune.experiments.recipe import LESS_IS_BETTER
from isotune.experiments.records import Record
from isotune.report.results import Comparison

Path = Sequence[tuple[float, float]]
"""Points (score on validation, forgetting), from the untrained model on."""

_NOTHING = 1e-6
"""Less than this is no forgetting: the rounding of a model that did not change, as under a head alone."""


@dataclass(frozen=True)
class AtOneScore:
    """What the methods had forgotten when they first reached the same score on validation."""

    level: float
    """The highest that the mean course of each method reaches."""
    forgotten: Mapping[str, Sequence[float]]
    """By label, for each seed that reaches it."""

    def mean(self, label: str) -> float | None:
        """The mean over the seeds."""
        found = self.forgotten.get(label)
        return statistics.fmean(found) if found else None

    def error(self, label: str) -> float | None:
        """The standard error of the mean; None for fewer than two seeds."""
        return standard_error(self.forgotten.get(label, ()))


def path_of(run: Record, score: str) -> Path:
    """The course of a run; empty where it was not measured.

    The untrained model has forgotten nothing; its score is that on the test data.
    """
    name = f"validation_{score}"
    found = [(point[name], point["forgetting"]) for point in run.curve if name in point and "forgetting" in point]
    start = run.untrained.get(score)
    return [(start, 0.0), *found] if found and start is not None else []


def mean_path(variant: MethodResult, score: str) -> Path:
    """The mean of the courses of a method's seeds, those of full length alone."""
    paths = [path for run in variant.runs if (path := path_of(run, score))]
    longest = max(map(len, paths), default=0)
    points = zip(*(path for path in paths if len(path) == longest), strict=True)
    return [(statistics.fmean(s for s, _ in one), statistics.fmean(f for _, f in one)) for one in points]


def at_one_score(comparison: Comparison) -> AtOneScore | None:
    """What was forgotten at the best score that all methods reach; None where fewer than two have a course."""
    score, sign = comparison.chosen_by, 1.0 if comparison.chosen_by not in LESS_IS_BETTER else -1.0
    courses = {v.label: mean_path(v, score) for v in comparison.variants}
    courses = {label: path for label, path in courses.items() if path and abs(path[-1][1]) > _NOTHING}
    if len(courses) < 2:
        return None
    level = min(max(sign * s for s, _ in path) for path in courses.values())
    starts = [sign * path[0][0] for path in courses.values()]
    if level <= max(starts):
        return None  # one of them learns nothing
    forgotten = {}
    for variant in comparison.variants:
        if variant.label in courses:
            paths = [[(sign * s, f) for s, f in path_of(run, score)] for run in variant.runs]
            forgotten[variant.label] = [f for path in paths if (f := _first_at(path, level)) is not None]
    return AtOneScore(sign * level, forgotten)


def _first_at(path: Path, level: float) -> float | None:
    """The forgetting where a course first reaches a score, on the straight line between the points about it."""
    for (before, kept), (score, forgotten) in itertools.pairwise(path):
        if score >= level:
            share = 1.0 if score <= before else max(0.0, (level - before) / (score - before))
            return kept + share * (forgotten - kept)
    return None
