"""What all tasks have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from isotune.experiments.recipe import Recipe
from isotune.experiments.resampling import Answers
from isotune.experiments.run import Run

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerCallback

    from isotune.experiments.encoded import Encoded
    from isotune.experiments.loop import Outcome


MEASURED_EXAMPLES = 256
"""How many training examples activations are measured on."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


class Task(ABC):
    """Data that have been read and checked, and how a model is built for, trained on and scored by them.

    Making a task reads and checks its data, and nothing else: neither the model nor its tokeniser is looked for.
    """

    peft_type: ClassVar[str | None]
    """What PEFT calls the kind of model (`peft.TaskType`), or None where it has no name for it."""

    sequences: ClassVar[int] = 1
    """How many sequences the model computes for an example in a training step."""

    generates: bool = False
    """Whether answers are written token by token, which takes long."""

    tokenizer: Any = None
    """The tokeniser of the model, loaded when it is asked for; None where it reads no text."""
    processor: Any = None
    """What makes a model's inputs and is saved beside its adapter; None where people have it with the base."""
    recipe: Recipe
    sizes: dict[str, int]
    """How many examples each of train, validation and test has; validation may be 0."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data, which tells whether a stored result is about these."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a result says of its data beside their sizes, as JSON."""

    def described(self) -> dict[str, Any]:
        """What a result says of its data, with their sizes and fingerprint."""
        return {**self.sizes, **self.about(), "fingerprint": self.fingerprint()}

    @cached_property
    def encoded(self) -> Encoded:
        """All splits as rows for the model, encoded once."""
        return self.encode()

    @property
    @abstractmethod
    def longest(self) -> Sequence[int]:
        """The tokens of the longest row; none where rows are no texts."""

    @abstractmethod
    def encode(self) -> Encoded:
        """All splits as rows for the model; raises ModelError where what encodes them cannot be loaded."""

    @abstractmethod
    def build(self) -> tuple[Any, list[str]]:
        """The base model, and the names of its modules that are new and trained beside any adapter.

        Draws from the global generator for the new modules only. Raises ModelError where the model cannot be loaded.
        """

    @abstractmethod
    def collator(self) -> Any:
        """What makes a batch of rows."""

    @abstractmethod
    def training_batch(self) -> dict[str, Any]:
        """The same batch of training examples at every call, as the model takes it, with labels."""

    def inputs(self) -> Iterator[dict[str, Any]]:
        """Batches of training examples as the model takes them, without labels: what activations are measured on."""
        rows, size, collate = self.encoded.train, self.recipe.train.eval_batch_size, self.collator()
        count = min(len(rows), MEASURED_EXAMPLES)
        for start in range(0, count, size):
            batch = collate([rows[index] for index in range(start, min(start + size, count))])
            yield {name: value for name, value in batch.items() if name in _INPUTS}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch as a training step computes it."""
        found: Tensor = model(**batch).loss
        return found

    def train(self, model: Any, run: Run, head: Sequence[str], callbacks: Sequence[TrainerCallback] = ()) -> Outcome:
        """Train a model that `build` made, with the adapter of the run's method, and score it on validation and test.

        Goes on where an earlier call stopped. `head` names the modules that are trained beside the adapter, `callbacks`
        are called with the whole model.
        """
        from isotune.experiments import loop

        return loop.train(model, self.encoded, run, head, callbacks)

    @abstractmethod
    def predict(self, model: Any) -> list[Any]:
        """What `model` answers to each test example, as JSON, in the order of `Outcome.predictions`."""

    @abstractmethod
    def score(self, predictions: Sequence[Any]) -> dict[str, float]:
        """The metrics of answers to the test examples."""

    @abstractmethod
    def answers(self, predictions: Sequence[Any]) -> Answers | None:
        """What was answered to the test examples, as classes or numbers, or as 1 for right and 0 for wrong beside 1.

        None where no metric adds up over the examples.
        """

    def score_untrained(self, model: Any) -> dict[str, float] | None:
        """The metrics of a model that `build` made, before it is trained; None where they would say nothing."""
        import torch

        training = model.training
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        try:
            return self.score(self.predict(model))
        finally:
            model.train(training)
