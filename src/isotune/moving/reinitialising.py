"""UORA's schedule: rows of the shared random matrices are re-initialised where the trained vector is small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isotune.adapter.shared import Renewal, SharedAdapter
from isotune.methods.checks import require
from isotune.moving.boundaries import BoundarySchedule
from isotune.moving.boundary import layers_of
from isotune.parallel.sharding import is_partitioned, is_sharded
from isotune.progress import bar
from isotune.subspace.random_rows import RandomRows
from isotune.tuner.adapted_model import AdaptedModel
from isotune.tuner.layer import Layer


@dataclass(frozen=True)
class Reinitialization:
    """What happened at one boundary."""

    number: int
    """The number of the boundary, from 1."""
    done: int
    """How many steps or epochs were finished."""
    rows: tuple[int, ...]
    """Which rows of A, with the same columns of B, were re-initialised."""
    changes: Mapping[str, float]
    """Layer name -> the change of its update, relative to the update before, in the Frobenius norm."""

    @property
    def change(self) -> float:
        """The largest change of a layer's update."""
        return max(self.changes.values(), default=0.0)


class UoraSchedule(BoundarySchedule[Reinitialization]):
    """Re-initialises rows of A and columns of B of a UORA adapter during training, every few optimiser steps or epochs.

    At each boundary |dᵢ| is averaged over the layers. Where it is below the threshold, row i of A and column i of B
    become (1 − weight)·old + weight·new, in all layers. So the function changes there: by how much, `history` says. The
    optimiser's state is kept. How often each row was re-initialised stands in the adapter's file, and with the seed it
    gives A and B.

    In a loop of your own call `step` after each optimiser step, or with unit="epoch" after each epoch. With
    transformers' and TRL's trainers give the schedule as a callback, callbacks=[schedule]: it then acts right before
    the first step after a boundary, so a checkpoint at a boundary holds the state before it, and resuming acts there.

    What the paper uses for threshold, weight and interval is not public, so they have no default.

    Args:
        threshold: the mean of |dᵢ| over the layers below which a row is re-initialised; at most d_initial, since a
            larger one would renew every row before anything is learnt.
        weight: the share of the new row, in (0, 1]; the same throughout a training.
        every: steps or epochs from one boundary to the next.
        unit: "step" or "epoch".
        adapter: the adapter's name.

    Raises:
        ValueError: a value is not allowed.

    Examples:
        >>> import torch
        >>> from isotune import UoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), UoraConfig(r=4, target_modules=["0"]))
        >>> optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        >>> schedule = UoraSchedule(threshold=0.1, weight=0.5, every=2)
        >>> for step in range(4):
        ...     model(torch.ones(1, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     found = schedule.step(model, optimizer)
        ...     optimizer.zero_grad()
        >>> [(one.done, len(one.rows) <= 4) for one in schedule.history]
        [(2, True), (4, True)]

    Source: Zhang et al., UORA (ACL 2025, arXiv 2505.20154), for the interpolation of rows and columns where the vector
        is small. That d alone decides, its mean over the layers, and what stays of the optimiser are isotune's own.
    """

    def __init__(
        self,
        *,
        threshold: float,
        weight: float,
        every: int,
        unit: Literal["step", "epoch"] = "step",
        adapter: str = "default",
    ) -> None:
        super().__init__(every, unit, adapter)
        finite = _is_number(threshold) and 0.0 < threshold < float("inf")
        require(finite, "threshold", threshold, "it must be a number above 0 and finite")
        share = float(torch.tensor(weight, dtype=torch.float32)) if _is_number(weight) else 0.0  # as in the file
        require(0.0 < share <= 1.0, "weight", weight, "it must be a number in (0, 1], rounded to float32")
        self.threshold, self.weight = threshold, share

    def _check(self, model: nn.Module, optimizer: Any) -> list[Layer]:
        """The layers of the adapter, if it can be re-initialised.

        Raises:
            ValueError: it cannot; says why and what to do.
        """
        refusal = "The adapter {} on {} cannot be re-initialised: {}"
        return layers_of(model, self.adapter, self._why_not, refusal)

    def _why_not(self, layer: Layer, whole: bool) -> str | None:
        adapter, start = layer.adapter(self.adapter), getattr(layer.configs[self.adapter], "d_initial", 0.0)
        if not isinstance(adapter, SharedAdapter):
            return "only UORA has random rows. Use MovingSchedule for methods on subspaces."
        if self.threshold > start:
            return (
                f"threshold={self.threshold:g} is above d_initial={start:g}, at which every entry of d starts, so that "
                "every row would be renewed before anything is learnt. Lower it."
            )
        if not whole or any(is_sharded(one) or is_partitioned(one) for one in adapter.parameters()):
            return "its vectors are spread over processes (FSDP or ZeRO-3). Use DDP, ZeRO-2, or one process."
        if any(one.is_meta for one in adapter.parameters()):
            return "it is offloaded and only brought for each call. Load the model without offloading."
        if layer.merged:
            return "an adapter is merged into the layer. Call unmerge_adapter() first."
        known = float(adapter.reinit_weight)
        if known != self.weight and bool(adapter.reinitializations.any()):
            return (
                f"its rows were re-initialised with weight={known:g}, of which its matrices are made, and not "
                f"{self.weight:g}. Go on with the same weight."
            )
        return None

    def _adapters(self, layers: Sequence[Layer]) -> Iterator[tuple[str, SharedAdapter]]:
        for layer in layers:
            adapter = layer.adapter(self.adapter)
            assert isinstance(adapter, SharedAdapter)
            yield layer.key, adapter

    def _last(self, own: AdaptedModel) -> int:
        return self._number(own, next(self._adapters(own.layers_with(self.adapter)))[1].reinit_boundary)

    @torch.no_grad()
    def _act(self, model: nn.Module, optimizer: Any, number: int, done: int) -> Reinitialization:
        own = dict(self._adapters(self._check(model, optimizer)))
        # On the CPU and in float64, so that all processes, whose parameters are equal, decide alike.
        d = torch.cat([a.vera_lambda_d.detach().cpu().double().reshape(-1, a.size) for a in own.values()])
        if not bool(torch.isfinite(d).all()):
            raise ValueError(
                f"The vectors d of {self.adapter!r} hold NaN or infinity: its training has diverged. Go on from an "
                "earlier checkpoint with a lower learning rate."
            )
        rows = tuple(torch.nonzero(d.abs().mean(0) < self.threshold).flatten().tolist())
        new: dict[str, Renewal] = {}
        changes: dict[str, float] = {}
        for key, adapter in bar(own.items(), desc="renewed rows", unit="weight"):
            new[key] = adapter.renewed(rows, number, self.weight)
            changes[key] = _change(adapter, new[key], rows)
        found = Reinitialization(number, done, rows, changes)
        undo = [(adapter, adapter.held()) for adapter in own.values()]
        try:  # whatever interrupts the exchange, be it between two tensors of a layer, the old values are put back
            for key, adapter in own.items():
                adapter.hold(new[key].buffers)
                adapter.refresh()
            self.history.append(found)
        except BaseException:
            for adapter, old in undo:
                adapter.hold(old)
                adapter.refresh()
            raise
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _change(adapter: SharedAdapter, new: Renewal, rows: Sequence[int]) -> float:
    """‖ΔW' − ΔW‖ / ‖ΔW‖ of the updates before and after; 0 if there was none."""
    at = list(rows)
    (up, down), (new_up, new_down) = (_factors(adapter, one) for one in (adapter.rows, new.rows))
    before = _norm(up, down)
    up, down, new_up, new_down = up[..., at], down[..., at, :], new_up[..., at], new_down[..., at, :]
    # U' D' − U D = U' (D' − D) + (U' − U) D, whose norm does not cancel.
    after = _norm(torch.cat([new_up, new_up - up], -1), torch.cat([new_down - down, down], -2))
    return after / before if before else 0.0


def _factors(adapter: SharedAdapter, rows: tuple[RandomRows, RandomRows]) -> tuple[Tensor, Tensor]:
    """Up and Down with these A and Bᵀ, in float64 where there is one."""
    d, b = adapter.vera_lambda_d.detach(), adapter.vera_lambda_b.detach()
    dtype = torch.float32 if d.device.type == "mps" else torch.float64
    down, up = (one.matrix(torch.float32, d.device).to(dtype) for one in rows)
    return b.to(dtype)[..., :, None] * up.t(), d.to(dtype)[..., :, None] * down


def _norm(up: Tensor, down: Tensor) -> float:
    """‖U D‖_F from two small Gram matrices."""
    return float(((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0.0).sqrt())
