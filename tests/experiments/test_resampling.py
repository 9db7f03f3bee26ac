"""Intervals of scores and of differences over the draw of the test examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isotune.experiments import resampling
from isotune.experiments.resampling import Answers, difference


def answers(predictions: Any, references: Any) -> Answers:
    found = Answers.of(list(predictions), list(references))
    assert found is not None
    return found


def test_only_numbers_in_pairs_are_answers() -> None:
    assert Answers.of([1], [1]) is None
    assert Answers.of([1, 2], [1]) is None
    assert Answers.of(["a", "b"], ["a", "b"]) is None
    assert Answers.of([1.0, float("nan")], [1, 2]) is None
    assert Answers.of([None, 1], [1, 2]) is None


@pytest.mark.parametrize("values", [[0, 3, 1], [0.5, -1.25, 3e-7]])
def test_answers_survive_their_file(values: list[float]) -> None:
    kept = answers(values, reversed(values)).stored()
    again = Answers.read(kept)
    assert again is not None
    assert again.predictions.tolist() == values
    assert again.references.tolist() == values[::-1]
    for damaged in ({}, {**kept, "predictions": "1 x 2"}, {**kept, "references": "1"}, {**kept, "references": None}):
        assert Answers.read(damaged) is None


def test_wilsons_interval_is_the_published_one() -> None:
    found = answers([1] * 8 + [0] * 2, [1] * 10).interval("accuracy")
    assert found is not None
    # Brown, Cai and DasGupta (2001) give the formula; 8 of 10 is 0.4902 to 0.9433.
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.4902, 0.9433)
    assert answers([1, 2], [1, 2]).interval("loss") is None


@pytest.mark.parametrize("metric", ["accuracy", "matthews_correlation", "pearson"])
def test_a_resampled_metric_is_that_of_the_examples_drawn(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw is made by hand: each kind of example as often as its neighbour was there."""
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 60)
    predictions = np.where(generator.random(60) < 0.5, labels, generator.integers(0, 4, 60))
    kinds, place = np.unique(np.stack([labels, predictions]), axis=1, return_inverse=True)
    counts = np.bincount(place.ravel())
    often = np.roll(counts, 1)

    class Made:
        def multinomial(self, count: int, shares: Any, size: int) -> Any:
            assert count == 60
            assert shares * count == pytest.approx(counts)
            return np.tile(often, (size, 1))

    monkeypatch.setattr(resampling.np.random, "default_rng", lambda seed: Made())
    monkeypatch.setattr(resampling, "RESAMPLES", 2)
    found = resampling._resampled(metric, [answers(predictions, labels)])[0]
    plain = {
        "accuracy": accuracy_score,
        "matthews_correlation": matthews_corrcoef,
        "pearson": lambda first, second: pearsonr(first, second).statistic,
    }[metric]
    assert found[0] == pytest.approx(plain(labels, predictions), abs=1e-12)
    drawn = np.repeat(kinds, often, axis=1)
    assert found[1:] == pytest.approx(plain(drawn[0], drawn[1]), abs=1e-12)


def test_examples_that_are_alike_are_drawn_as_often_as_there_are() -> None:
    """The spread is that of a binomial, as if each example were drawn for itself."""
    one = answers([1] * 300 + [0] * 700, [1] * 1000)
    scores = resampling._resampled("accuracy", [one])[0]
    assert scores[0] == 0.3
    assert scores[1:].std() == pytest.approx((0.3 * 0.7 / 1000) ** 0.5, rel=0.1)
    assert scores[1:].mean() == pytest.approx(0.3, abs=0.002)


def test_answers_that_are_all_alike_correlate_with_nothing() -> None:
    assert set(resampling._resampled("matthews_correlation", [answers([1, 1, 1], [0, 1, 1])])[0]) == {0.0}


@pytest.mark.parametrize("metric", ["matthews_correlation", "pearson"])
def test_the_bootstrap_has_a_fixed_seed_and_narrows_with_more_examples(metric: str) -> None:
    generator = np.random.default_rng(0)

    def width(count: int) -> float:
        labels = generator.integers(0, 2, count)
        predictions = np.where(generator.random(count) < 0.8, labels, 1 - labels)
        found = answers(predictions, labels).interval(metric)
        assert found is not None
        assert found == answers(predictions, labels).interval(metric)
        correlation = np.corrcoef(predictions, labels)[0, 1]  # of two classes Matthews' is Pearson's
        assert found["low"] < correlation < found["high"]
        return float(found["high"] - found["low"])

    assert width(400) < 0.6 * width(50)


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    """Two methods that fail at the same hard examples, but for a few."""
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 500)
    hard = generator.random(500) < 0.3
    pairs = []
    for _ in range(3):
        common = np.where(hard, 1 - labels, labels)
        better = np.where(hard & (generator.random(500) < 0.15), labels, common)
        pairs.append((answers(better, labels), answers(common, labels)))
    found = difference("accuracy", pairs)
    assert found is not None
    gains = [np.mean(one.predictions == labels) - np.mean(other.predictions == labels) for one, other in pairs]
    assert found["mean"] == pytest.approx(np.mean(gains))
    assert 0 < found["low"] < found["mean"] < found["high"] < 2.5 * found["mean"]
    alone = pairs[0][0].interval("accuracy")
    assert alone is not None
    assert found["high"] - found["low"] < 0.5 * (alone["high"] - alone["low"])
    assert (found["seeds"], found["level"]) == (3, 0.95)


def test_a_difference_counts_the_scatter_of_the_seeds() -> None:
    """All examples are alike, so that only the seeds differ."""
    labels = np.zeros(40)
    scores = [(0.9, 0.5), (0.5, 0.9), (0.8, 0.5)]
    pairs = [tuple(answers(np.arange(40) >= score * 40, labels) for score in both) for both in scores]
    found = difference("accuracy", pairs)  # type: ignore[arg-type]
    assert found is not None
    assert found["low"] < 0 < found["high"]


def test_answers_to_other_examples_are_not_set_against_each_other() -> None:
    one, other = answers([0, 1], [0, 1]), answers([0, 1], [1, 1])
    assert difference("accuracy", [(one, other)]) is None
    assert difference("accuracy", []) is None
    assert difference("loss", [(one, one)]) is None
