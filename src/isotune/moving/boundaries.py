"""What schedules have in common: boundaries every few steps or epochs, in a loop and in transformers' trainers."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn

from isotune.internals.torch_state import uncompiled, version_of
from isotune.methods.checks import require_choice, require_positive_integer
from isotune.moving.boundary import adapted
from isotune.tuner.adapted_model import AdaptedModel

Record = TypeVar("Record")
"""What a schedule says of one boundary."""
Known = TypeVar("Known")
"""What a schedule knows of one model."""


class _OfModels(weakref.WeakKeyDictionary[AdaptedModel, Known]):
    """What a schedule knows of each model as long as it lives; a pickled one is empty, since it has other models."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class BoundarySchedule(ABC, Generic[Record]):
    """Counts the steps or epochs of a training and acts at each boundary, once.

    Args:
        every: steps or epochs from one boundary to the next.
        unit: "step" or "epoch".
        adapter: the adapter's name.

    Raises:
        ValueError: a value is not allowed.
    """

    def __init__(self, every: int, unit: Literal["step", "epoch"], adapter: str) -> None:
        require_positive_integer("every", every)
        require_choice("unit", unit, ("step", "epoch"))
        self.every, self.unit, self.adapter = every, unit, adapter
        self.history: list[Record] = []
        """What this schedule object did at its boundaries, oldest first."""
        self._counted: _OfModels[int] = _OfModels()
        """How many steps or epochs each model has finished."""
        self._former: _OfModels[int] = _OfModels()
        """How many boundaries each model's adapter had passed before the Trainer's present training."""
        self._read: _OfModels[tuple[Tensor, int, int]] = _OfModels()
        """The tensor of each model that was read last, its version then, and the number in it."""

    def step(self, model: nn.Module, optimizer: Any, done: int | None = None) -> Record | None:
        """Count one step or epoch, and act if a boundary is reached; after the optimiser's step, before the next pass.

        Args:
            model: the model, as trained.
            optimizer: the optimiser that trains the adapter.
            done: how many steps or epochs are finished in all, former trainings of the adapter included; None counts
                the calls, from the last boundary that the adapter's file knows of, for each model by itself. Give it
                when a training resumes between two boundaries, and after the schedule has been pickled there.

        Returns:
            What was done, as in `history`; None between boundaries.

        Raises:
            ValueError: the schedule cannot act here; says why. Raised at a model's first call; nothing is changed.
        """
        model = uncompiled(model)
        own = adapted(model)
        before = self._counted.get(own)
        if before is None:
            self._check(model, optimizer)
        last = self._last(own)
        passed = last or 0
        if done is None:
            done = (passed * self.every if before is None else before) + 1
        elif before is None and done // self.every < passed:
            if done == 0:
                return None  # before the first step of a loop that begins anew, or goes on, and then counts its calls
            raise ValueError(
                f"done={done}, but {self.adapter!r} has passed {passed} boundaries, with every={self.every} after "
                f"{passed * self.every} {self.unit}s, and would not meet another before the next. Count former "
                "trainings of the adapter too, or leave done out: it counts on from the last boundary."
            )
        starts = self._starts(last, done, first=before is None)
        self._counted[own] = done
        number = done // self.every
        return self._act(model, optimizer, number, done) if starts or number > passed else None

    def _starts(self, last: int | None, done: int, *, first: bool) -> bool:
        """Whether to act before the first step, too.

        Args:
            last: as `_last` says.
            done: how many steps or epochs are finished.
            first: whether this is the model's first call.
        """
        return False

    @abstractmethod
    def _check(self, model: nn.Module, optimizer: Any) -> Any:
        """Refuse, by a ValueError, a model on which the schedule cannot act."""

    @abstractmethod
    def _last(self, own: AdaptedModel) -> int | None:
        """The number of the last boundary, from the adapter itself; 0 or None before the first."""

    def _number(self, own: AdaptedModel, boundary: Tensor) -> int:
        """The number in a buffer of the adapter; reading it from a GPU waits, so it is kept while it is true."""
        read = self._read.get(own)
        if read is None or read[0] is not boundary or read[1] != version_of(boundary):
            read = self._read[own] = boundary, version_of(boundary), int(boundary)
        return read[2]

    @abstractmethod
    def _act(self, model: nn.Module, optimizer: Any, number: int, done: int) -> Record:
        """Do what belongs to the boundary of this number, after so many steps or epochs, and note it in `history`."""

    # -- as a TrainerCallback ------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count anew: the Trainer does, unless it resumes."""
        self._former.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Act before the first step after a boundary."""
        model, own = given["model"], adapted(given["model"])
        # The Trainer adds up shares of an epoch; at its end the sum is a whole number up to rounding.
        done = state.global_step if self.unit == "step" else int(state.epoch + 1e-6)
        if own not in self._former:
            self._check(model, given["optimizer"])
            # Where a training resumes, this boundary is not passed yet: it is the first thing that happens here.
            before = state.global_step - 1 if self.unit == "step" else math.ceil(state.epoch - 1e-6) - 1
            self._former[own] = max(0, (self._last(own) or 0) - max(0, before) // self.every)
        self.step(model, given["optimizer"], self._former[own] * self.every + done)

    def __getattr__(self, name: str) -> Any:
        """The other events of a TrainerCallback, of which none concerns a schedule."""
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
