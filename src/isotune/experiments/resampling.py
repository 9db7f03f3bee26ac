"""What a model answered to the test examples, and how scores and differences of scores vary with the draw of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 1000

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """A class or a number for every test example, and the right ones, both (examples,)."""

    predictions: Numbers
    references: Numbers

    @staticmethod
    def of(predictions: Sequence[Any], references: Sequence[Any]) -> Answers | None:
        """The answers, where they are numbers and at least two; None else."""
        if len(predictions) != len(references) or len(predictions) < 2:
            return None
        try:
            found = [np.asarray(values, dtype=np.float64) for values in (predictions, references)]
        except (TypeError, ValueError):
            return None
        return Answers(*found) if all(values.ndim == 1 and np.isfinite(values).all() for values in found) else None

    @staticmethod
    def read(stored: Mapping[str, Any]) -> Answers | None:
        """What `stored` gave; None where it is something else."""
        texts = (stored.get("predictions"), stored.get("references"))
        try:
            predictions, references = ([float(one) for one in str(text).split()] for text in texts)
        except ValueError:
            return None
        return Answers.of(predictions, references)

    def stored(self) -> dict[str, str]:
        """As JSON, in which each list is one line of text."""
        both = {"predictions": self.predictions, "references": self.references}
        return {name: " ".join(f"{value:.9g}" for value in values) for name, values in both.items()}

    def interval(self, metric: str) -> dict[str, Any] | None:
        """The 95 % interval of a metric over the draw of the test examples, for one trained model.

        Wilson's for an accuracy; for a correlation the percentiles of 1,000 resamples with a fixed seed. None for
        another metric.
        """
        if metric == "accuracy":
            from scipy.stats import binomtest

            hits = int((self.predictions == self.references).sum())
            found = binomtest(hits, len(self.references)).proportion_ci(LEVEL, method="wilson")
            return {"level": LEVEL, "low": float(found.low), "high": float(found.high), "how": "Wilson"}
        if metric not in _SCORES:
            return None
        low, high = _percentiles(_resampled(metric, [self])[0, 1:])
        return {"level": LEVEL, "low": low, "high": high, "how": "bootstrap of test examples"}


def difference(metric: str, pairs: Sequence[tuple[Answers, Answers]]) -> dict[str, Any] | None:
    """By how much the first of two methods scores higher than the second, with a 95 % interval.

    The interval has the percentiles of 1,000 resamples, with a fixed seed, of the seeds and of the test examples, both
    methods being resampled alike: what is hard for one model is mostly hard for the other, and counts for neither.

    Args:
        pairs: the answers of both methods, one pair a seed.

    Returns:
        `{"mean", "low", "high", "level", "seeds"}`; None for no pair, for a metric that is none of the answers', and
        for answers to different examples.
    """
    if not pairs or metric not in _SCORES:
        return None
    first = pairs[0][0].references
    if not all(np.array_equal(first, one.references) for pair in pairs for one in pair):
        return None
    seeds = len(pairs)
    scores = _resampled(metric, [one for pair in pairs for one in pair]).reshape(seeds, 2, -1)
    of_seeds = np.random.default_rng(1).multinomial(seeds, [1 / seeds] * seeds, RESAMPLES).T / seeds
    gain = scores[:, 0] - scores[:, 1]
    low, high = _percentiles((gain[:, 1:] * of_seeds).sum(0))
    return {"mean": float(gain[:, 0].mean()), "low": low, "high": high, "level": LEVEL, "seeds": seeds}


def _percentiles(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(metric: str, models: Sequence[Answers]) -> Numbers:
    """The metric of each model on its answers and on RESAMPLES resamples, (models, 1 + RESAMPLES).

    All are to the same examples, which are resampled alike for all. Examples to which every model gave the same answers
    count as one that is drawn more often, so that many examples cost no more than few.
    """
    table = np.stack([models[0].references, *(one.predictions for one in models)])
    alike, counts = np.unique(table, axis=1, return_counts=True)
    examples = int(counts.sum())
    drawn = np.random.default_rng(0).multinomial(examples, counts / examples, RESAMPLES)
    weights = np.concatenate([counts[None], drawn]).astype(np.float64).T
    terms, score = _SCORES[metric]
    return np.stack([score(terms(Answers(row, alike[0])) @ weights, examples) for row in alike[1:]])


def _hits(answers: Answers) -> Numbers:
    found: Numbers = (answers.predictions == answers.references).astype(np.float64)[None]
    return found


def _accuracy(sums: Numbers, examples: int) -> Numbers:
    found: Numbers = sums[0] / examples
    return found


def _cells(answers: Answers) -> Numbers:
    """Which example has which pair of classes, (classes², examples)."""
    classes, both = np.unique([answers.predictions, answers.references], return_inverse=True)
    one, two = both.reshape(2, -1)
    cells: Numbers = np.arange(len(classes) ** 2)[:, None] == one * len(classes) + two
    return cells.astype(np.float64)


def _matthews(sums: Numbers, examples: int) -> Numbers:
    """Source: Gorodkin (2004), the correlation of two assignments to k classes."""
    classes = round(len(sums) ** 0.5)
    table = sums.reshape(classes, classes, -1)
    rows, columns = table.sum(1), table.sum(0)
    agreed = np.trace(table)
    variances = [examples**2 - (counts**2).sum(0) for counts in (rows, columns)]
    return _ratio(agreed * examples - (rows * columns).sum(0), variances[0] * variances[1])


def _moments(answers: Answers) -> Numbers:
    x, y = (values - values.mean() for values in (answers.predictions, answers.references))
    return np.stack([x, y, x * x, y * y, x * y])


def _pearson(sums: Numbers, examples: int) -> Numbers:
    x, y, xx, yy, xy = sums / examples
    return _ratio(xy - x * y, np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))


def _ratio(covariance: Numbers, product: Numbers) -> Numbers:
    # A resample may hold one value only; as in scikit-learn's Matthews correlation that counts as none.
    norm = np.sqrt(product)
    return np.divide(covariance, norm, out=np.zeros_like(norm), where=norm > 0)


_SCORES = {
    "accuracy": (_hits, _accuracy),
    "matthews_correlation": (_cells, _matthews),
    "pearson": (_moments, _pearson),
}
"""What of each example a metric adds up, (sums, examples), and the metric as a function of the sums."""
