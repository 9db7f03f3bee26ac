"""Texts, or pairs of texts, and their class."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator

from isotune.experiments import data, loop, models, processes
from isotune.experiments.encoded import Encoded, class_scores, likeliest, regression_scores
from isotune.experiments.recipe import Recipe, Train
from isotune.experiments.run import Run
from isotune.experiments.tasks.task import Task

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
        return self.measure(predictions, [row["labels"] for row in self.encoded.test])

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

    def train(
        self, model: Any, run: Run, head: Sequence[str], callbacks: Sequence[TrainerCallback] = ()
    ) -> loop.Outcome:
        if run.method.name != "head" or not isinstance(model, models.MeanPooledClassifier):
            return super().train(model, run, head, callbacks)
        # The encoder does not change, so each text is embedded once and not once an epoch.
        encoded = self.encoded
        began = time.perf_counter()
        features = replace(
            encoded,
            collate=default_data_collator,
            train=_features(model, encoded.train, encoded.collate, run.settings),
            validation=_features(model, encoded.validation, encoded.collate, run.settings),
            test=_features(model, encoded.test, encoded.collate, run.settings),
        )
        bare = models.FeatureHead(model.dropout, model.classifier).eval()
        embedding = time.perf_counter() - began
        outcome = loop.train(bare, features, run, head)
        # The loop has seen embeddings and no tokens.
        seconds = outcome.seconds + embedding
        return replace(outcome, model=model, seconds=seconds, tokens_per_second=None)


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


def _features(model: Any, rows: Sequence[Row], collate: Any, settings: Train) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    found: list[Any] = [None] * len(rows)
    with torch.no_grad():
        for start in processes.with_bar(range(0, len(rows), settings.eval_batch_size), "embedding", "batch"):
            indices = order[start : start + settings.eval_batch_size]
            batch = {name: value.to(device) for name, value in collate([rows[i] for i in indices]).items()}
            batch.pop("labels")
            for i, feature in zip(indices, model.embed(**batch).cpu(), strict=True):
                found[i] = {"features": feature, "labels": rows[i]["labels"]}
    return found
