"""What all forms of an update have in common: W' = W + s·ΔW, by itself or placed by a basis of its layer's weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import autocasts, working_dtype
from isotune.adapter.operator import Adapter, Base, Below, FrozenLinear
from isotune.adapter.placement import Factors, Mark, Placement
from isotune.parallel.tensor_parallel import UNSPLIT, Shares


class Update(Adapter):
    """An adapter that adds an update of low rank to its layer's weight, times a scale s."""

    additive = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.configured_scale = self.scale = 1.0
        """s: as configured, and currently."""

    def _scaled(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in which the update is linear, times the scale."""
        tensor = tensor.to(dtype)
        return tensor if self.scale == 1.0 else tensor * self.scale

    @abstractmethod
    def added(self, x: Tensor, tensors: tuple[Tensor, ...], base: Base, shares: Shares = UNSPLIT) -> Tensor:
        """The layer's output with the update of x, in one node.

        Args:
            x: (..., in), or this process's share of its columns.
            tensors: the result of `tensors`.
            base: the layer's own output, or this process's share of its columns, or the linear layer; this one in the
                dtype of x.
            shares: those of x and of the output.
        """

    def output(self, x: Tensor, tensors: tuple[Tensor, ...], below: Below) -> Tensor:
        """The output below, in its dtype, with the update of x; in training x has its dropout.

        The update is computed in the dtype of the output, under autocast in that of autocast.
        """
        result, division = below.call(x), below.division
        if not isinstance(result, Tensor):
            raise below.no_tensor(result)
        x = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        dtype = working_dtype(x) if autocasts(x) else result.dtype
        return self.added(x.to(dtype), tensors, result, (division.of_input(x), division.of_output(result)))

    def fused(self, x: Tensor, tensors: tuple[Tensor, ...], linear: FrozenLinear) -> Tensor | None:
        """x Wᵀ + b and the update in one node; None under autocast, with dropout, or if x has not the dtype of W."""
        if x.dtype != linear[0].dtype or (self.dropout and self.training) or autocasts(x):
            return None
        return self.added(x, tensors, linear)

    @property
    def has_low_rank(self) -> bool:
        """True: the update has rank r."""
        return True

    @property
    def form_key(self) -> Hashable:
        """The configured scale."""
        return self.configured_scale

    def describe(self) -> str:
        """The rank."""
        return f"rank {self.size}"

    def set_scale(self, scale: float) -> None:
        """Multiply the configured scale of the update by `scale`; 0 gives the base's layer."""
        self.scale = self.configured_scale * scale

    @property
    def relative_scale(self) -> float:
        """The current scale divided by the configured one."""
        return self.scale / self.configured_scale


class PlacedUpdate(Update):
    """An update that depends on a basis V of singular vectors of its layer's weight."""

    narrow: ClassVar[bool] = True
    """Whether the factors of its placement may be in half precision, as the weight."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.placement: Placement | None = None
        """Where the update acts; None until the adapter is placed."""

    @abstractmethod
    def factors_on(self, basis: Tensor, matrix: Tensor, accumulated: Factors | None) -> Factors:
        """The frozen factors of the update for a basis on a weight.

        Args:
            basis: V, (..., k, in), at least float32, with orthonormal rows.
            matrix: W, (..., out, in).
            accumulated: U (out, k) and D (k, in) of an update from earlier subspaces; None if there is none.

        Returns:
            down and up of a `Placement`, new tensors on the device of W.
        """

    def placed(
        self,
        basis: Tensor,
        matrix: Tensor,
        stored: Sequence[Tensor],
        weight: Tensor,
        accumulated: Factors | None = None,
    ) -> Placement:
        """The placement of the update for a basis on a weight, as in `factors_on`.

        Args:
            basis, matrix, accumulated: as there.
            stored: the stored buffers: the pin or V itself, one per expert.
            weight: the frozen parameter from which `matrix` was read.
        """
        return Placement(
            *self.factors_on(basis, matrix, accumulated),
            tuple(buffer.detach().clone() for buffer in stored),
            tuple(Mark.of(buffer, sampled=False) for buffer in stored),
            Mark.of(weight),
            accumulated=0 if accumulated is None else len(accumulated[1]),
        )

    @property
    @abstractmethod
    def placement_key(self) -> Hashable:
        """Adapters on one layer with equal keys and equal stored bases have equal placements."""

    @property
    def basis_rank(self) -> int:
        """k, the number of vectors of the basis."""
        return self.size

    @property
    def accumulated_rank(self) -> int:
        """The rank of the update that is accumulated on earlier subspaces."""
        return 0 if self.placement is None else self.placement.accumulated

    def describe(self) -> str:
        """The rank, and that of what is accumulated."""
        more = self.accumulated_rank
        return f"{super().describe()}, {more} more accumulated" if more else super().describe()

    @property
    def fixed(self) -> str | None:
        """Why its subspace cannot move in training, and what to do; None if it can."""
        return "its method has one subspace for good. Use PSOFT, LoRA-XS, SVFit, CERSA, ROSA or PESO."

    def start(self, placement: Placement, generator: torch.Generator) -> dict[str, Tensor]:
        """The values at which the parameters start on a new placement.

        Args:
            placement: the new one.
            generator: on the CPU, for what is drawn at random.
        """
        raise NotImplementedError

    def spanning(self) -> Tensor:
        """Rows, (r, in), that span the subspace in which the update acts now."""
        raise NotImplementedError

    def factors(self, dtype: torch.dtype, device: torch.device) -> Factors:
        """The two frozen factors of the placement, down and up, in this dtype and on this device.

        Raises:
            ValueError: the adapter is not placed.
        """
        placement = self.placement
        if placement is None:
            raise ValueError(
                "The subspace of an adapter is not placed on its layer yet: call the whole model once instead of the "
                "layer alone, so that all subspaces are found on the base's weights."
            )
        down, up = placement.factors
        if down.dtype == dtype and down.device == device:
            return down, up
        return down.to(device, dtype), up.to(device, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PlacedUpdate:
        super()._apply(fn, recurse)
        if self.placement is not None:
            self.placement = self.placement.moved(fn, narrow=self.narrow)
        return self
