"""What each method forgot for what it learnt: on the way of a training, and from one learning rate to the next."""

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
    """The highest that each method reaches, by the mean of its courses or at some rate."""
    forgotten: Mapping[str, Sequence[float]]
    """By label, for each seed that reaches it."""
    of: Mapping[str, int]
    """By label, how many seeds there are."""

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


def sign(comparison: Comparison) -> float:
    """What makes of scores on validation numbers of which more is better."""
    return -1.0 if comparison.chosen_by in LESS_IS_BETTER else 1.0


def by_rate(variant: MethodResult, score: str) -> list[Record]:
    """The trainings of a method's search that measured both, by rate; empty for fewer than two."""
    found = [run for run in variant.search if score in run.validation and run.forgetting is not None]
    return found if len(found) > 1 else []


def rate_path(variant: MethodResult, score: str) -> Path:
    """Where the trainings of a method's search ended, by rate: a higher one usually learns and forgets more."""
    found = by_rate(variant, score)
    start = next((run.untrained[score] for run in found if score in run.untrained), None)
    ends = [(run.validation[score], run.forgetting or 0.0) for run in found]
    return [(start, 0.0), *ends] if start is not None else []


def at_one_score(comparison: Comparison) -> AtOneScore | None:
    """What was forgotten at the best score that all methods reach on their way; None where fewer than two have one."""
    score = comparison.chosen_by
    return _at_one_score(
        comparison,
        {v.label: mean_path(v, score) for v in comparison.variants},
        {v.label: [path_of(run, score) for run in v.runs] for v in comparison.variants},
    )


def at_one_score_by_rate(comparison: Comparison) -> AtOneScore | None:
    """What was forgotten at the best score that all methods reach at a rate of their search, of one seed each."""
    paths = {v.label: rate_path(v, comparison.chosen_by) for v in comparison.variants}
    return _at_one_score(comparison, paths, {label: [path] for label, path in paths.items()})


def _at_one_score(
    comparison: Comparison, courses: Mapping[str, Path], seeds: Mapping[str, Sequence[Path]]
) -> AtOneScore | None:
    better = sign(comparison)
    courses = {label: path for label, path in courses.items() if path and abs(path[-1][1]) > _NOTHING}
    if len(courses) < 2:
        return None
    level = min(max(better * s for s, _ in path) for path in courses.values())
    starts = [better * path[0][0] for path in courses.values()]
    if level <= max(starts):
        return None  # one of them learns nothing
    forgotten = {}
    for label in courses:
        paths = [[(better * s, f) for s, f in path] for path in seeds[label]]
        forgotten[label] = [f for path in paths if (f := _first_at(path, level)) is not None]
    return AtOneScore(better * level, forgotten, {label: len(seeds[label]) for label in courses})


def _first_at(path: Path, level: float) -> float | None:
    """The forgetting where a course first reaches a score, on the straight line between the points about it."""
    for (before, kept), (score, forgotten) in itertools.pairwise(path):
        if score >= level:
            share = 1.0 if score <= before else max(0.0, (level - before) / (score - before))
            return kept + share * (forgotten - kept)
    return None
