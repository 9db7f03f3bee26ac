"""The form *subspace update*: y = host(x) + s·((x downᵀ)(M − I)) upᵀ, M on the coordinates of a subspace."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import autocasts
from isotune.adapter.kernels import decoding_kernels, linear_with_update, subspace_update
from isotune.adapter.operator import FrozenLinear, Operator
from isotune.adapter.placement import Placement, filling, place
from isotune.adapter.update import PlacedUpdate
from isotune.parallel.tensor_parallel import Division

_WIDE = (torch.float32, torch.float64)
"""Dtypes in which small differences survive; half precision rounds them away."""


class SubspaceBasis(nn.Module):
    """The stored basis of one adapter on one layer: the pin S = V Ω, (r, p), or V itself.

    It stays float32 whatever the model is cast to. All zeros mean that no subspace has been found yet.

    Args:
        rank: r.
        in_features: number of columns of W.
        pin_width: p; None stores V itself.
        device: device of the buffer.
    """

    pin: Tensor | None
    basis: Tensor | None

    def __init__(self, rank: int, in_features: int, pin_width: int | None, device: torch.device) -> None:
        super().__init__()
        self.embedded = pin_width is None
        stored = torch.zeros(rank, pin_width or in_features, device=device, dtype=torch.float32)
        self.register_buffer("pin", None if self.embedded else stored)
        self.register_buffer("basis", stored if self.embedded else None)

    @property
    def stored(self) -> Tensor:
        """The pin, (r, p), or the basis, (r, in)."""
        stored = self.basis if self.embedded else self.pin
        assert stored is not None
        return stored

    @torch.no_grad()
    def record(self, value: Tensor) -> None:
        """Store a pin or a basis."""
        if self.stored.is_meta:
            setattr(self, "basis" if self.embedded else "pin", torch.empty_like(self.stored, device=value.device))
        self.stored.copy_(value)

    def _apply(self, fn: Any, recurse: bool = True) -> SubspaceBasis:
        before = self.stored
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.stored.dtype != before.dtype:
            setattr(self, "basis" if self.embedded else "pin", before.to(self.stored.device))
        return self


class SubspaceAdapter(PlacedUpdate, Operator):
    """An operator on the r coordinates of the principal subspace, in the form of an update; M − I is (r, r).

    Args:
        size: r.
    """

    principal = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.power = 0.0
        """How the singular values are split between the two factors: the power p of `Placement`."""

    @abstractmethod
    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Map parameters, all with the same leading dimensions, to M − I of shape (..., r, r)."""

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor]:
        """M − I, padded with zeros to the size of the factors, (..., r or more, r or more)."""
        difference, zeros = self.difference_of(parameters), filling(self.size)
        return (nn.functional.pad(difference, (0, zeros, 0, zeros)) if zeros else difference,)

    def difference(self, dtype: torch.dtype | None = None) -> Tensor:
        """M − I, (r, r)."""
        return self._own(self.tensors(dtype)[0])

    def _own(self, difference: Tensor) -> Tensor:
        """M − I without its zero padding."""
        return difference[..., : self.size, : self.size]

    def matrix(self) -> Tensor:
        """M itself, (r, r)."""
        difference = self.difference()
        return difference + torch.eye(self.size, dtype=difference.dtype, device=difference.device)

    def operate(self, x: Tensor) -> Tensor:
        """x M for x of shape (..., r)."""
        return x + x @ self.difference(x.dtype)

    def _scaled(self, difference: Tensor, dtype: torch.dtype) -> Tensor:
        """s (M − I)."""
        difference = difference.to(dtype)
        return difference if self.scale == 1.0 else difference * self.scale

    def placed(self, basis: Tensor, matrix: Tensor, stored: Sequence[Tensor], weight: Tensor) -> Placement:
        """down = Σᵖ V and up = W Vᵀ Σ⁻ᵖ, as `place` makes them."""
        return place(basis, matrix, stored, weight, power=self.power)

    @property
    def placement_key(self) -> Hashable:
        """The rank, and how the singular values are split."""
        return self.size, self.power

    def output(
        self,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        host: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        division: Division | None,
    ) -> Tensor:
        """host(x) + s·((x downᵀ)(M − I)) upᵀ, in the dtype of the host's output."""
        result = host(x)
        if self.dropout:
            x = nn.functional.dropout(x, self.dropout, self.training)
        (down, up), dtype = self.factors(result.dtype, result.device), result.dtype
        of_x = None if division is None else division.of_input(x)
        of_result = None if division is None else division.of_output(result)
        if of_x is not None:
            down = down[:, of_x.span]
        if of_result is not None:
            up = up[of_result.span]
        return subspace_update(x.to(dtype), self._scaled(tensors[0], dtype), result, (down, up), of_x, of_result)

    def fused(self, x: Tensor, tensors: tuple[Tensor, ...], linear: FrozenLinear) -> Tensor | None:
        """x Wᵀ + b with its update; None under autocast, with dropout, or if x does not have the dtype of W."""
        weight, bias = linear
        if x.dtype != weight.dtype or (self.dropout and self.training) or autocasts(x):
            return None
        # Adding the update to the input saves work if in < out. But it needs ∂L/∂x, which a first layer does not
        # compute, and half precision would round a small update away in x; in both cases it is added to the output.
        on_input = (
            not self.power
            and weight.shape[1] < weight.shape[0]
            and x.dtype in _WIDE
            and (x.requires_grad or not torch.is_grad_enabled())
        )
        update, factors = self._scaled(tensors[0], x.dtype), self.factors(x.dtype, x.device)
        if kernels := decoding_kernels(x, weight, bias, factors):
            down, up = self._absorbed(tensors[0], update, factors)
            rows: Tensor | None = kernels.linear_with_update(x.reshape(1, -1), weight, bias, down, up)
            if rows is not None:
                return rows.view(*x.shape[:-1], rows.shape[-1])
        return linear_with_update(x, update, factors, weight, bias, on_input=on_input)

    def _absorbed(self, difference: Tensor, update: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """down and up, the smaller one times s·(M − I); kept until a call ends, if `difference` lasts that long."""
        given, sources = self.given, (difference, self.placement, self.scale)
        if given.made is not None and all(map(operator.is_, given.made[0], sources)):
            kept: tuple[Tensor, Tensor] = given.made[1]
            return kept
        down, up = factors
        found = (update.mT @ down, up) if down.shape[1] <= up.shape[0] else (down, up @ update.mT)
        # While a CUDA graph is captured, nothing has a value until the graph is replayed.
        captured = difference.is_cuda and torch.cuda.is_current_stream_capturing()
        if given.tensors is not None and given.tensors[0] is difference and not captured:
            given.made = sources, found
        return found

    def fold(
        self,
        matrix: Tensor,
        tensors: tuple[Tensor, ...],
        *,
        drop: bool = False,
        rows: Tensor | None = None,
        at: Tensor | None = None,
        multiple: Tensor | None = None,
    ) -> Tensor:
        """W + s·up (M − I)ᵀ down."""
        (down, up), rank = self.factors(matrix.dtype, matrix.device), self.size
        down, up, update = down[..., :rank, :], up[..., :rank], self._scaled(self._own(tensors[0]), matrix.dtype)
        if matrix.ndim == 3 and at is not None:
            down, up = down.index_select(0, at), up.index_select(0, at)
        if rows is None:
            return matrix + (up @ update.mT) @ down
        # Recomputed from the rows (up = W downᵀ, divided if the singular values are split), so that any factor by which
        # the look-up multiplies rows of W also multiplies their update.
        up = rows @ (down / down.square().sum(1, keepdim=True)).mT
        return torch.addmm(matrix, up @ update.mT, down)

    def low_rank(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """s·up (M − I)ᵀ and down."""
        wide = torch.promote_types(matrix.dtype, torch.float32)
        down, up = self.factors(wide, matrix.device)
        return up[:, : self.size] @ self._scaled(self.difference(), wide).mT, down[: self.size]

    @property
    def form_key(self) -> Hashable:
        """The configured scale, and how the singular values are split."""
        return self.configured_scale, self.power

    def describe(self) -> str:
        """The rank."""
        return f"rank {self.size}"
