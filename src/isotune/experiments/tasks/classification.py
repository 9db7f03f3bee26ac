"""Texts, or pairs of texts, and their class."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator

from isotune.experiments import data, loop, models, processes
from isotune.experiments.encoded import Encoded, class_scores, likeliest, regression_scores
from isotune.experiments.recipe import Recipe
from isotune.experiments.resampling import Answers
from isotune.experiments.run import Run
from isotune.experiments.tasks.task import Task
from isotune.files.pooled import loss_of

Row = dict[str, Any]


class Classifier(Task):
    """What tasks of texts and of images share: a prediction for each example, from one row of outputs."""

    examples: data.Examples

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.examples = self.load()
        self.sizes = {split: len(getattr(self.examples, split)) for split in ("train", "validation", "test")}

    @abstractmethod
    def load(self) -> data.Examples:
        """Read and check the data."""

    @abstractmethod
    def rows(self, split: Sequence[data.Example]) -> list[Row]:
        """Examples as rows for the model, with their labels."""

    @abstractmethod
    def collator(self) -> Any:
        """What makes a batch of rows."""

    def length(self, row: Row) -> int:
        """By which rows are grouped where the recipe asks for it."""
        return 1

    @property
    def longest(self) -> Sequence[int]:
        encoded = self.encoded
        row = max((*encoded.train, *encoded.validation, *encoded.test), key=self.length)
        tokens: Sequence[int] = row.get("input_ids", ())
        return tokens

    def encode(self) -> Encoded:
        train = self.rows(self.examples.train)
        # Validation and test are sorted by length, which saves padding and changes no score.
        return Encoded(
            train=train,
            validation=sorted(self.rows(self.examples.validation), key=self.length),
            test=sorted(self.rows(self.examples.test), key=self.length),
            collate=self.collator(),
            metric=self.recipe.metric,
            score=self.measure,
            decide=self.decide,
            lengths=[self.length(row) for row in train],
            options={"compute_loss_func": mean_loss},
        )

    def fingerprint(self) -> str:
        return self.examples.fingerprint()

    def about(self) -> dict[str, Any]:
        majority = Counter(e.label for e in self.examples.train).most_common(1)[0][0]
        return {
            "labels": self.examples.labels,
            "majority_accuracy": sum(e.label == majority for e in self.examples.test) / len(self.examples.test),
        }

    def training_batch(self) -> dict[str, Any]:
        return dict(self.encoded.collate(self.encoded.train[: self.recipe.train.batch_size]))

    @abstractmethod
    def last_layer(self, model: Any, head: Sequence[str]) -> nn.Module | None:
        """What makes the outputs of few numbers for each example, by which alone a head can be trained; or None."""

    def train(
        self, model: Any, run: Run, head: Sequence[str], callbacks: Sequence[TrainerCallback] = ()
    ) -> loop.Outcome:
        last = self.last_layer(model, head) if run.method.name == "head" else None
        if last is None:
            return super().train(model, run, head, callbacks)
        # The encoder does not change, so each example goes through it once and not once an epoch.
        encoded, size, began = self.encoded, run.settings.eval_batch_size, time.perf_counter()
        splits = {
            split: _features(model, last, getattr(encoded, split), encoded.collate, self.length, size)
            for split in ("train", "validation", "test")
        }
        if None in splits.values():
            return super().train(model, run, head, callbacks)
        bare = models.FeatureHead(getattr(model, "dropout", nn.Identity()), last).eval()
        embedding = time.perf_counter() - began
        features: Any = {**splits, "collate": default_data_collator}
        outcome = loop.train(bare, replace(encoded, **features), run, ["classifier"])
        # The loop has seen embeddings and no tokens.
        return replace(outcome, model=model, seconds=outcome.seconds + embedding, tokens_per_second=None)

    def predict(self, model: Any) -> list[Any]:
        encoded, size = self.encoded, self.recipe.train.eval_batch_size
        device = next(model.parameters()).device
        found: list[Any] = []
        with torch.no_grad():
            for start in range(0, len(encoded.test), size):
                batch = encoded.collate(encoded.test[start : start + size])
                batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                found += self.decide(model(**batch).logits.cpu())
        return found

    def score(self, predictions: Sequence[Any]) -> dict[str, float]:
        return self.measure(predictions, self._labels())

    def answers(self, predictions: Sequence[Any]) -> Answers | None:
        return Answers.of(predictions, self._labels())

    def _labels(self) -> list[int | float]:
        """Of the test examples, in the order of predictions."""
        return [row["labels"] for row in self.encoded.test]

    def decide(self, logits: Any) -> list[Any]:
        """Predictions from logits (examples, classes)."""
        return likeliest(logits)

    def measure(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Metrics of predictions (examples,) against labels (examples,)."""
        return class_scores(predictions, labels)


class TextClassification(Classifier):
    """A class for each text, from logits (examples, classes); see `Task`."""

    peft_type = "SEQ_CLS"

    def load(self) -> data.Examples:
        return data.load(self.recipe.data)

    def build(self) -> tuple[Any, list[str]]:
        return models.load_classifier(self.recipe.model, self.recipe.pooling, self.examples.labels)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return models.tokenizer_for(self.recipe.model)

    @property
    def processor(self) -> Any:
        """The model's tokeniser."""
        return self.tokenizer

    def rows(self, split: Sequence[data.Example]) -> list[Row]:
        if not split:
            return []
        pairs = [e.pair for e in split] if split[0].pair is not None else None
        length = self.recipe.train.max_length
        tokens = self.tokenizer([e.text for e in split], pairs, truncation=True, max_length=length)
        return [
            {**{name: column[i] for name, column in tokens.items()}, "labels": example.label}
            for i, example in enumerate(split)
        ]

    def collator(self) -> Any:
        return DataCollatorWithPadding(self.tokenizer)

    def length(self, row: Row) -> int:
        return len(row["input_ids"])

    def last_layer(self, model: Any, head: Sequence[str]) -> nn.Module | None:
        return model.classifier if isinstance(model, models.MeanPooledClassifier) else None


class TextRegression(TextClassification):
    """A number for each text, from outputs (examples, 1); see `Task`."""

    def load(self) -> data.Examples:
        return data.load(self.recipe.data, regression=True)

    def about(self) -> dict[str, Any]:
        return {}

    def decide(self, logits: Any) -> list[Any]:
        numbers: list[float] = np.asarray(logits, dtype=float).reshape(-1).tolist()
        return numbers

    def measure(self, predictions: Any, labels: Any) -> dict[str, float]:
        return regression_scores(predictions, labels)


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The mean loss of a batch, or its part in the mean of an update of `num_items_in_batch` examples.

    For Trainer, which takes classifiers of transformers for models that divide by this number, since their forward
    takes any keyword, and would multiply loss and gradient by the number of parts and processes.
    """
    mean = loss_of(outputs.logits, labels)
    if num_items_in_batch is None:
        return mean
    # Under nn.DataParallel there is a copy of the number for each device, by the count of which Trainer multiplies.
    return mean * (len(labels) / torch.as_tensor(num_items_in_batch).sum())


def _features(
    model: Any, last: nn.Module, rows: Sequence[Row], collate: Any, length: Callable[[Row], int], size: int
) -> list[Row] | None:
    """What the last layer reads of each row; None where the model's outputs are not those of this layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    found: list[Any] = [None] * len(rows)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = last.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    try:
        for start in processes.with_bar(range(0, len(rows), size), "embedding", "batch"):
            indices = order[start : start + size]
            batch = {name: value.to(device) for name, value in collate([rows[i] for i in indices]).items()}
            labels, seen[:] = batch.pop("labels"), []
            with torch.no_grad():
                logits = model(**batch).logits
            if len(seen) != 1 or seen[0][1] is not logits:
                return None
            for i, feature, label in zip(indices, seen[0][0].cpu(), labels.tolist(), strict=True):
                found[i] = {"features": feature, "labels": label}
    finally:
        hook.remove()
    return found
