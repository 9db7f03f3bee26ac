"""What a comparison found, in one sentence that says no more than its seeds can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from isotune.experiments import scores
from isotune.experiments.outcome import MethodResult, reference_of
from isotune.experiments.registry import entry, is_plain
from isotune.report.results import Comparison
from isotune.versions import install

CONFIDENCE = 0.95
POINT = 0.01
"""The most by which a method that matches another may be worse: a percentage point, or one percent of a loss."""
ALIKE = 1.25
"""Adapters whose parameters differ by at most this factor are of one size."""
THRIFTY = 1.8
"""How many times smaller an adapter must be for its size to be worth a sentence."""

Verdict = Literal["better", "level", "worse", "open"]


@dataclass(frozen=True)
class Finding:
    """A sentence, and what it stands on."""

    sentence: str
    basis: str


def finding(comparison: Comparison) -> Finding | None:
    """What the scores of a comparison show about its adapters; None where there are no scores.

    Methods are set against LoRA, or against the best where LoRA is missing. A method "beats" another where the
    two-sided 95 % interval of their difference lies above zero, and "matches" it where the interval holds zero and
    reaches no further below it than a point, or than half of what the other gains over the head alone. The error of a
    difference is the larger of the two methods' own (Welch) and of that with the scatter of all adapters pooled, as in
    an analysis of variance, whose degrees of freedom count.
    """
    rivals = [v for v in comparison.scored if not is_plain(v.name)] or comparison.scored
    if not rivals:
        return None
    judge = _Judge(comparison)
    if len(rivals) == 1:
        return _of_one(judge, rivals[0])
    best = judge.ranked(rivals)[0]
    reference = reference_of(rivals) or best
    verdicts = {v.label: judge.verdict(v, reference) for v in rivals if v is not reference}
    others = [v for v in rivals if v is not reference]
    clauses = [judge.clause(group, verdict, reference) for group, verdict in _shown(judge, others, reference, verdicts)]
    if clauses:
        return Finding("; ".join(clauses) + ".", judge.basis(reference, level="level" in verdicts.values()))
    if all(verdict == "worse" for verdict in verdicts.values()):
        following = judge.ranked(others)[0]
        gap = judge.gap(following, reference)
        sentence = f"{judge.name(reference)} does best; the next, {judge.name(following)}, is {gap} worse."
        return Finding(sentence, judge.basis(reference))
    return _open(judge, rivals, best)


def _shown(
    judge: _Judge, others: Sequence[MethodResult], reference: MethodResult, verdicts: dict[str, Verdict]
) -> list[tuple[list[MethodResult], Verdict]]:
    """What is worth saying: who beats the reference at its size, or at all, and the smallest that is as good."""
    better = judge.ranked([v for v in others if verdicts[v.label] == "better"])
    level = judge.ranked([v for v in others if verdicts[v.label] == "level"])
    lead = [v for v in better if judge.alike(v, reference)] or better[:1]
    small = [(ratio, v) for v in (*better, *level) if (ratio := judge.ratio(v, reference)) and ratio >= THRIFTY]
    smallest = max(small, key=lambda pair: pair[0])[1] if small else None
    found: list[tuple[list[MethodResult], Verdict]] = [(lead, "better")] if lead else []
    if smallest is not None and smallest not in lead:
        found.append(([smallest], verdicts[smallest.label]))
    if not found and level:
        found.append(([v for v in level if judge.alike(v, reference)] or level[:1], "level"))
    return found


def _of_one(judge: _Judge, variant: MethodResult) -> Finding:
    comparison = judge.comparison
    name, head = judge.name(variant), judge.head
    if head is None or head is variant:
        reached, seeds = comparison.shown(variant.mean, variant.standard_error), _seeds(len(variant.scores))
        return Finding(f"{name} reaches {reached} with {seeds}; it was compared with nothing.", "")
    verdict = judge.verdict(variant, head)
    if verdict == "open":
        return _open(judge, [variant, head], judge.ranked([variant, head])[0])
    how = f"{judge.gap(variant, head)} {verdict} than" if verdict != "level" else "as good as"
    return Finding(
        f"{name} reaches {comparison.shown(variant.mean)}, {how} the head alone.",
        judge.basis(head, level=verdict == "level"),
    )


def _open(judge: _Judge, rivals: Sequence[MethodResult], best: MethodResult) -> Finding:
    """Scores between which the seeds cannot decide."""
    comparison = judge.comparison
    near = [v for v in judge.ranked(rivals) if v is not best and judge.verdict(v, best) != "worse"]
    fewest = min(len(v.scores) for v in (best, *near))
    which = "highest" if comparison.higher_is_better else "lowest"
    told = f"{judge.name(near[0])} ({comparison.shown(near[0].mean)})" if len(near) == 1 else "the others"
    if 1 < len(near) < len(rivals) - 1:
        told = _listed([judge.name(v) for v in near])
    has = f"{judge.name(best)} has the {which} {comparison.metric_name} ({comparison.shown(best.mean)})"
    how = "" if comparison.foreign else " (--seeds 3)"
    basis = f"A difference is judged by how far the seeds of a method lie apart: run at least three{how}."
    sentence = f"{has}, but {_seeds(fewest)} cannot tell it from {told}."
    return Finding(sentence, basis if fewest == 1 else judge.basis(best))


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c", "a, b and 3 more"."""
    shown = list(names) if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


class _Judge:
    """Differences between the methods of one comparison, and their names in a sentence."""

    def __init__(self, comparison: Comparison) -> None:
        try:
            from scipy.stats import t as student
        except ImportError as error:
            raise ValueError(f"a report needs scipy: {install('report')}") from error
        self.comparison = comparison
        self.ranked = comparison.ranked
        self.head = next((v for v in comparison.scored if v.name == "head"), None)
        # A head on features that are computed once scatters less than what trains the whole way through.
        adapters = [v for v in comparison.scored if not is_plain(v.name)] or comparison.scored
        repeated = [(v.scores, v.mean or 0.0) for v in adapters if len(v.scores) > 1]
        self.freedom = sum(len(scores) - 1 for scores, _ in repeated)
        squares = sum((score - mean) ** 2 for scores, mean in repeated for score in scores)
        self.variance = squares / self.freedom if self.freedom else 0.0
        self.reach = float(student.ppf((1 + CONFIDENCE) / 2, self.freedom or 1))
        titles = [entry(v.name).title for v in comparison.variants]
        self._names = {
            v.label: title if titles.count(title) == 1 and not comparison.foreign else v.title
            for v, title in zip(comparison.variants, titles, strict=True)
        }

    def name(self, variant: MethodResult) -> str:
        """Without its options where the method is there once."""
        return self._names[variant.label]

    def difference(self, variant: MethodResult, other: MethodResult) -> float:
        """By how much the first is better."""
        return self.comparison.sign * ((variant.mean or 0.0) - (other.mean or 0.0))

    def verdict(self, variant: MethodResult, other: MethodResult) -> Verdict:
        """What is shown of the first against the second; "open" where it is nothing, as with single seeds."""
        if variant.standard_error is None or other.standard_error is None:
            return "open"
        pooled = math.sqrt(self.variance * (1 / len(variant.scores) + 1 / len(other.scores)))
        error = max(pooled, math.hypot(variant.standard_error, other.standard_error))
        difference, reach = self.difference(variant, other), self.reach * error
        if difference - reach > 0:
            return "better"
        if difference + reach < 0:
            return "worse"
        return "level" if difference - reach > -self.margin(other) else "open"

    def margin(self, reference: MethodResult) -> float:
        """By how much a method that matches the reference may be worse."""
        margin = POINT if self.comparison.higher_is_better else POINT * abs(reference.mean or 0.0)
        gained = 0.0 if self.head in (None, reference) else self.difference(reference, self.head or reference)
        return min(margin, gained / 2) if gained > 0 else margin

    def gap(self, variant: MethodResult, other: MethodResult) -> str:
        """The size of the difference of two methods."""
        return scores.difference(self.comparison.metric, abs(self.difference(variant, other)), sign="")

    @staticmethod
    def size(variant: MethodResult) -> float | None:
        """The trainable parameters of the adapter, or all where these are not known apart."""
        return variant.average("adapter_parameters") or variant.average("trainable_parameters")

    def ratio(self, variant: MethodResult, reference: MethodResult) -> float | None:
        """How many times larger the reference is."""
        own, others = self.size(variant), self.size(reference)
        return others / own if own and others else None

    def alike(self, variant: MethodResult, reference: MethodResult) -> bool:
        """Whether two methods are of one size."""
        ratio = self.ratio(variant, reference)
        return ratio is not None and 1 / ALIKE <= ratio <= ALIKE

    def clause(self, group: Sequence[MethodResult], verdict: Verdict, reference: MethodResult) -> str:
        """Who beats or matches the reference, and at which size."""
        one = len(group) == 1
        verb = ("beats" if one else "beat") if verdict == "better" else ("matches" if one else "match")
        what = f"{_listed([self.name(v) for v in group])} {verb} {self.name(reference)}"
        if all(self.alike(v, reference) for v in group):
            return f"{what} at its size"
        ratio = self.ratio(group[0], reference)
        return what if ratio is None or not one else f"{what} with {share(1 / ratio)} its parameters"

    def basis(self, reference: MethodResult, *, level: bool = False) -> str:
        """How certain the sentence is."""
        size = self.comparison.data.get("test")
        test = f"these {size:,} test examples" if isinstance(size, int) else "these test examples"
        margin = scores.difference(self.comparison.metric, self.margin(reference), sign="")
        means = f" To match means to be at most {margin} worse." if level else ""
        return f"With {100 * CONFIDENCE:.0f} % confidence over the seeds, on {test}.{means}"


_SHARES = ("half", "a third", "a quarter", "a fifth", "a sixth", "a seventh", "an eighth", "a ninth", "a tenth")


def share(part: float) -> str:
    """A part of a whole before "its parameters": "an eighth of", "29 % of", "3.1 times".

    A fraction stands for what it misses by at most 7 %.
    """
    whole = round(1 / part)
    if 2 <= whole <= len(_SHARES) + 1 and abs(part * whole - 1) <= 0.07:
        return f"{_SHARES[whole - 2]} of"
    if part < 1:
        return f"{100 * part:.2g} % of"
    return f"{part:.2g} times" if part < 99.5 else f"{part:,.0f} times"
