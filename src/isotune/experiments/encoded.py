"""What a run trains on and is scored by: encoded splits, their order, and the metrics of predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from isotune.experiments.recipe import Metric

Row = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """What a run trains on and is scored by: rows, how to batch them, and the metric to choose checkpoints by.

    `decide` turns a model's outputs into predictions, `score` these and the labels into metrics. A task whose answers
    are not read off one row of outputs gives `examine` instead, which makes of a model and "validation" or "test" the
    predictions and the metrics; checkpoints are then chosen by the loss. `trainer`, `arguments` and `options` are for
    another of transformers' trainers than the plain one.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    collate: Any
    metric: Metric
    lengths: Sequence[int]
    score: Callable[[Any, Any], dict[str, float]] | None = None
    decide: Callable[[Any], list[Any]] | None = None
    examine: Callable[[Any, str], tuple[list[Any], dict[str, float]]] | None = None
    trainer: type[Trainer] | None = None
    arguments: Callable[..., TrainingArguments] = TrainingArguments
    options: Mapping[str, Any] = field(default_factory=dict)

    def measured(self, output: Any) -> dict[str, float]:
        """The metrics of a trainer's predictions."""
        assert self.score is not None
        assert self.decide is not None
        return self.score(self.decide(output.predictions), output.label_ids)

    def examined(self, trainer: Any, split: str) -> tuple[list[Any], dict[str, float]]:
        """Predictions and metrics of a trainer's model on a split."""
        if self.examine is not None:
            return self.examine(trainer.model, split)
        output = trainer.predict(getattr(self, split))
        assert self.decide is not None
        return self.decide(output.predictions), self.measured(output)


def likeliest(logits: Any) -> list[int]:
    """The class of the greatest logit, from (examples, classes)."""
    classes: list[int] = np.asarray(logits).argmax(-1).tolist()
    return classes


def class_scores(predicted: Any, labels: Any) -> dict[str, float]:
    """Accuracy and Matthews correlation of predicted classes (examples,) against labels (examples,)."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def regression_scores(predicted: Any, labels: Any) -> dict[str, float]:
    """Pearson and Spearman correlation of predicted numbers (examples,) with the labels (examples,).

    Equal predictions correlate with nothing: they score 0, where the formula has no value.
    """
    from scipy.stats import pearsonr, spearmanr

    predicted, labels = np.asarray(predicted, dtype=float), np.asarray(labels, dtype=float)
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, labels).statistic),
        "spearman": float(spearmanr(predicted, labels).statistic),
    }


class LengthGrouped(Sampler[int]):
    """A shuffle in which a batch holds texts of like length, so little is padded.

    The order depends on seed and epoch alone, never on the global generator: a run resumed in the middle of
    an epoch sees the rest of the very same order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, grouped: bool) -> None:
        self.lengths, self.batch_size, self.seed, self.grouped = lengths, batch_size, seed, grouped
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        if not self.grouped:
            return iter(order.tolist())
        # Sorting within pools of 50 batches keeps the batches random from epoch to epoch.
        pool = 50 * self.batch_size
        batches: list[Any] = []
        for start in range(0, len(order), pool):
            chunk = order[start : start + pool]
            chunk = chunk[np.argsort([self.lengths[i] for i in chunk], kind="stable")]
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        # A short last batch stays last, or every batch after it would straddle two groups.
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in generator.permutation(len(batches))] + short
        return iter(np.concatenate(shuffled).tolist())
