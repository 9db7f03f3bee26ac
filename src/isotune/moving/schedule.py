"""When subspaces move: one schedule for a plain loop and for transformers' trainers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from isotune.errors import IsotuneWarning
from isotune.methods.checks import require, require_choice, require_positive_integer
from isotune.moving.boundaries import BoundarySchedule
from isotune.moving.boundary import Move, layers_to_move, move
from isotune.moving.choosing import CHOICES, Loss, gradient_subspaces, loss_of, present_subspace
from isotune.moving.optimiser import STATES
from isotune.subspace.selection import drawn_start, generator_for, singular_subspace
from isotune.tuner.adapted_model import AdaptedModel
from isotune.tuner.layer import Layer

Select = Literal["top", "bottom", "band", "warm", "gradient"]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class MovingSchedule(BoundarySchedule[Move]):
    """Moves the subspaces of an adapter during training, every few optimiser steps or epochs.

    At each boundary the update of every layer is folded into an accumulated one, W + U D; the next subspace is chosen
    from the current weight, and the operator starts there at the identity, so that the function stays as it was. The
    base is never written: U and D are kept beside the basis and saved in the adapter's file.

    In a loop of your own call `step` after each optimiser step, or with unit="epoch" after each epoch. With
    transformers' and TRL's trainers give the schedule as a callback, callbacks=[schedule]: it then moves right before
    the first step after a boundary, so a checkpoint at a boundary holds the state before the move, and resuming moves.

    Args:
        every: steps or epochs from one boundary to the next.
        unit: "step" or "epoch".
        select: the next subspace: the "top" or "bottom" right singular vectors of the current weight, a "band" of
            neighbours at a random place, the top ones of the full "gradient" of the weight, or "warm", the present
            subspace again, on the weight so far.
        optimizer_state: "reset" forgets what the optimiser keeps for the adapter's parameters, "keep" leaves it, and
            "project" carries the moments of AdamW, Adam or SGD to the coordinates of the next subspace.
        at_start: whether to choose a subspace before the first step too, by `select`, of an adapter that has never
            moved. A loop of your own then calls `step(model, optimizer, done=0)` before its first step; transformers'
            trainers do.
        max_rank: the largest rank of an accumulated update. Above it the smallest singular values are cut off;
            `history` has the error. None keeps everything, of a rank that grows by at most r with each move.
        largest_error: an error of a cut above it, relative to the layer's accumulated update, gives a warning.
        seed: of the places of bands; each also depends on the number of the move and the layer's name alone.
        adapter: the adapter's name.
        batches: for "gradient": the batches whose gradients are summed, or a function that returns them. They are
            iterated at each boundary; of several processes, each gives its own.
        loss: for "gradient": a function of model and batch that returns the loss; None for `model(**batch).loss`.
        gradient_memory: for "gradient": bytes that the full gradients of layers may take at once; at least one layer
            is held. The batches are run once for each group of layers that fits.

    Raises:
        ValueError: a value is not allowed.

    Examples:
        >>> import torch
        >>> from isotune import LoraXsConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraXsConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        >>> schedule = MovingSchedule(every=2)
        >>> for step in range(5):
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        ...     move = schedule.step(model, optimizer)
        ...     optimizer.zero_grad()
        >>> [(move.done, dict(move.ranks)) for move in schedule.history]
        [(2, {'0': 2}), (4, {'0': 4})]

    Source: the idea is ReLoRA's (Lialin et al., arXiv 2307.05695) and ROSA's (Hameed et al., arXiv 2407.07802), which
    merge into the weight; restarting along the full gradient, and warm starts, are PESO's (Lou et al., arXiv
    2512.02216). That the base stays and the accumulated update is kept as factors, what "warm" takes, and how "project"
    works, is isotune's own.
    """

    def __init__(
        self,
        every: int = 1,
        *,
        unit: Literal["step", "epoch"] = "step",
        select: Select = "top",
        optimizer_state: Literal["reset", "keep", "project"] = "reset",
        at_start: bool = False,
        max_rank: int | None = None,
        largest_error: float = 0.01,
        seed: int = 0,
        adapter: str = "default",
        batches: Batches | None = None,
        loss: Loss | None = None,
        gradient_memory: int = 2**30,
    ) -> None:
        super().__init__(every, unit, adapter)
        require_choice("select", select, CHOICES)
        require_choice("optimizer_state", optimizer_state, STATES)
        if max_rank is not None:
            require_positive_integer("max_rank", max_rank)
        require(0.0 <= largest_error < math.inf, "largest_error", largest_error, "it must be a number of at least 0")
        require(isinstance(seed, int), "seed", seed, "it must be an integer")
        require(isinstance(at_start, bool), "at_start", at_start, "it must be True or False")
        require_positive_integer("gradient_memory", gradient_memory)
        if (select == "gradient") != (batches is not None):
            need = "needs batches=, whose gradients it sums" if batches is None else "does not use batches"
            raise ValueError(f"select={select!r} {need}; give batches with select='gradient' and with no other.")
        self.select, self.optimizer_state, self.at_start = select, optimizer_state, at_start
        self.max_rank, self.largest_error, self.seed = max_rank, largest_error, seed
        self.batches, self.loss, self.gradient_memory = batches, loss or loss_of, gradient_memory

    def _check(self, model: nn.Module, optimizer: Any) -> list[Layer]:
        """Refuse a model whose subspaces cannot move."""
        return layers_to_move(model, self.adapter, optimizer, self.optimizer_state)

    def _starts(self, last: int | None, done: int, *, first: bool) -> bool:
        """Whether `at_start` asks for a subspace now."""
        starts = self.at_start and last is None and done == 0
        if self.at_start and last is None and first and not starts:
            raise ValueError(
                f"at_start=True, but {done} {self.unit}s are finished and the subspaces of {self.adapter!r} have never "
                "moved. Call step(model, optimizer, done=0) before the first step."
            )
        return starts

    def _last(self, own: AdaptedModel) -> int | None:
        bases = [basis for layer in own.layers_with(self.adapter) for basis in layer.bases(self.adapter)]
        moves = bases[0].moves if bases else None
        return None if moves is None else self._number(own, moves)

    def _act(self, model: nn.Module, optimizer: Any, number: int, done: int) -> Move:
        chosen: dict[str, Tensor] = {}
        if self.select == "gradient":
            layers = layers_to_move(model, self.adapter, optimizer, self.optimizer_state)
            batches = self.batches() if callable(self.batches) else self.batches
            inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
            bases = gradient_subspaces(inner, layers, self.adapter, batches or (), self.loss, self.gradient_memory)
            chosen = {layer.key: basis for layer, basis in zip(layers, bases, strict=True)}

        def choose(current: Tensor, layer: Layer) -> Tensor:
            if layer.key in chosen:
                return chosen[layer.key].to(current)
            if self.select == "warm":
                return present_subspace(layer, self.adapter)
            rank, start = layer.subspace(self.adapter).size, None
            if self.select == "band":  # from these alone, so that a resumed training and every process draw the same
                start = drawn_start(min(current.shape), rank, generator_for(self.seed, number, layer.key))
            return singular_subspace(current, rank, self.select, start=start, name=f"module {layer.key!r}").basis

        found = move(
            model,
            optimizer,
            self.adapter,
            choose,
            number=number,
            done=done,
            optimizer_state=self.optimizer_state,
            max_rank=self.max_rank,
            seed=self.seed,
        )
        self.history.append(found)
        if found.error > self.largest_error:
            warnings.warn(
                f"At {self.unit} {done} accumulated updates were cut to rank {self.max_rank}, which changed that of "
                f"{found.worst!r} by {found.error:.2g} of its norm (largest_error={self.largest_error:g}). Raise "
                "max_rank, or leave it at None to keep everything.",
                IsotuneWarning,
                stacklevel=2,
            )
        return found
