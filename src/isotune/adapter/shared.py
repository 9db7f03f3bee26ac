"""The form of UORA and VeRA: y = host(x) + s·b ⊙ (((x Aᵀ) ⊙ d) Bᵀ), with frozen A and B that all layers share."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import is_recorded
from isotune.adapter.kernels import input_gradient, output_with, weight_of
from isotune.adapter.lowrank import LowRankAdapter
from isotune.adapter.operator import Base
from isotune.algebra.factors import refuse_double_backward
from isotune.algebra.recording import is_plain
from isotune.internals.torch_state import is_symbolic, version_of
from isotune.parallel.tensor_parallel import UNSPLIT, Shares
from isotune.subspace.random_rows import RandomRows


class _SharedUpdate(torch.autograd.Function):
    """`shared_update`, saving only x downᵀ (tokens × r) for backward.

    If x or the result is tensor-parallel, down or up and b hold this process's columns or rows, as in
    `subspace_update`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        d: Tensor,
        b: Tensor,
        base: Base,
        factors: tuple[Tensor, Tensor],
        shares: Shares,
    ) -> Tensor:
        (down, up), (of_x, of_result) = factors, shares
        flat = x.reshape(-1, x.shape[-1])
        coordinates = of_x.total(torch.mm(flat, down.t()))
        ctx.save_for_backward(coordinates, d, b)
        ctx.factors, ctx.weight, ctx.of_result = factors, weight_of(base), of_result
        # Rows of the factor are scaled, not outputs, of which there is one for each token.
        return output_with(flat, x.shape, base, coordinates * d, (up * b[:, None]).t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        coordinates, d, b = ctx.saved_tensors
        down, up = ctx.factors
        needs_x, needs_d, needs_b, needs_base, *_ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1]).to(up.dtype)
        grad_b = (torch.mm(flat.t(), coordinates * d) * up).sum(1) if needs_b else None
        read = ctx.of_result.total(torch.mm(flat, up * b[:, None]))
        grad_d = (read * coordinates).sum(0) if needs_d else None
        grad_x = input_gradient(gradient, ctx.weight, read * d, down) if needs_x else None
        return grad_x, grad_d, grad_b, gradient if needs_base else None, None, None


def shared_update(
    x: Tensor,
    d: Tensor,
    b: Tensor,
    base: Base,
    factors: tuple[Tensor, Tensor],
    shares: Shares,
) -> Tensor:
    """Add an update of frozen factors between trained vectors, as `subspace_update` adds one of a trained matrix.

    Args:
        x, base, shares: as there.
        d: (r,), times the scale.
        b: (out,), cut to the share.
        factors: A (r, in) and B (out, r), in the dtype of x and cut to the shares.

    Returns:
        base + b ⊙ (((x Aᵀ) ⊙ d) Bᵀ), differentiable once.
    """
    if is_plain():
        assert isinstance(base, Tensor)
        down, up = factors
        return base + b * ((d * (x @ down.t())) @ up.t())
    result: Tensor = _SharedUpdate.apply(x, d, b, base, factors, shares)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Held:
    """The matrices that an adapter uses, and the state of the counts from which they follow."""

    counts: Tensor
    """The buffer itself: another one could be given the id of one that is gone."""
    version: int
    """How often it had been written to."""
    rows: tuple[RandomRows, RandomRows] | None
    """None for matrices without values."""
    masters: tuple[Tensor, ...]
    """A and Bᵀ in float32 on the CPU; held, so that no layer has to make them again."""
    down: Tensor
    up: Tensor

    def __deepcopy__(self, memo: Any) -> _Held:
        return self  # nothing of it is ever written to

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a pickle of the model holds what it follows from


@dataclass(frozen=True)
class Renewal:
    """What an adapter becomes at a boundary."""

    buffers: Mapping[str, Tensor]
    rows: tuple[RandomRows, RandomRows]
    """What A and Bᵀ then follow from."""
    masters: tuple[Tensor, ...]
    """A and Bᵀ in float32 on the CPU; held, so that no layer has to make them again."""


class SharedAdapter(LowRankAdapter):
    """Down = diag(d) A and Up = diag(b) B with trained vectors and random A and B that all layers of their shape share.

    A and B are neither parameters nor buffers: they follow from the seed, their shapes, and how many times each
    row of A, with the same column of B, has been re-initialised. For backward a layer keeps x Aᵀ alone.

    Args:
        size: r.
        in_features: of W; 0 if it is not known, so that nothing can be computed.
        out_features: of W.
        seed: of A and B.
        start: d at the start; b starts at zero.

    Source: Kopiczko, Blankevoort and Asano, VeRA (ICLR 2024, arXiv 2310.11454), equation 2.
    """

    evaluated = ("vera_lambda_d", "vera_lambda_b")
    reinitializations: Tensor
    """How many times each row of A and column of B has been re-initialised, (r,); whole numbers in float32."""
    reinit_boundary: Tensor
    """The number of the last boundary of a schedule, a scalar."""
    reinit_weight: Tensor
    """The share of the new row in each re-initialisation, a scalar; 0 before the first boundary."""

    def __init__(self, size: int, in_features: int, out_features: int, seed: int, start: float) -> None:
        super().__init__(size)
        self.in_features, self.out_features, self.seed = in_features, out_features, seed
        self.vera_lambda_d = nn.Parameter(torch.full((size,), start, dtype=torch.float32))
        self.vera_lambda_b = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))
        self.register_buffer("reinitializations", torch.zeros(size, dtype=torch.float32))
        self.register_buffer("reinit_boundary", torch.zeros((), dtype=torch.float32))
        self.register_buffer("reinit_weight", torch.zeros((), dtype=torch.float32))
        self._held: _Held | None = None

    def batch_key(self) -> Hashable:
        """r and the seed."""
        return self.size, self.seed

    def is_identity(self) -> bool:
        """Whether b is zero."""
        return not bool(self.vera_lambda_b.detach().any())

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """d (..., r) and b (..., out): the factors themselves would be as large as A and B for each layer."""
        return parameters["vera_lambda_d"], parameters["vera_lambda_b"]

    def forward(self, dtype: torch.dtype | None = None, at: Tensor | None = None) -> tuple[Tensor, ...]:
        """Copies of d and b, since who brought the parameters for this call may take them away afterwards."""
        return tuple(tensor.clone() for tensor in super().forward(dtype, at))

    def _acting(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """s·Down and Up, where they are needed whole."""
        d, b = super()._acting(tensors, dtype)
        down, up = self.matrices(dtype, d.device)
        return d[..., :, None] * down, b[..., :, None] * up

    def added(self, x: Tensor, tensors: tuple[Tensor, ...], base: Base, shares: Shares = UNSPLIT) -> Tensor:
        """base + s·b ⊙ (((x Aᵀ) ⊙ d) Bᵀ)."""
        d, b = super()._acting(tensors, x.dtype)  # s·d and b alone
        down, up = self.matrices(x.dtype, x.device)
        of_x, of_result = shares
        factors = of_x.cut(down), of_result.cut(up, 0)
        return shared_update(x, d, of_result.of(b), base, factors, shares)

    def kept(self, in_features: int) -> int:
        """x Aᵀ."""
        return self.size

    # -- A and B -------------------------------------------------------------------------------------------------------

    def matrices(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) in this dtype and on this device; shared, so not to be written to."""
        held = self._held or self._made(dtype)
        if (held.down.dtype, held.down.device) != (dtype, device):
            if is_recorded() or held.rows is None:
                return held.down.to(device, dtype), held.up.to(device, dtype)
            down, up = (one.matrix(dtype, device) for one in held.rows)
            held = replace(held, down=down, up=up.t())
        self._held = held
        return held.down, held.up

    def refresh(self, dtype: torch.dtype | None = None) -> None:
        """Make A and B anew if the counts were replaced or written to; reading these from a GPU waits."""
        held, counts = self._held, self.reinitializations
        wanted = dtype or (torch.float32 if held is None else held.down.dtype)
        same = held is not None and held.counts is counts and held.version == version_of(counts)
        if held is None or not same or held.down.dtype != wanted:
            self._held = self._made(wanted)

    def in_use(self) -> dict[Hashable, Tensor]:
        """A and B as this layer holds them, by what the layers that share them have in common."""
        if self._held is None:
            return {}
        held = (self._held.down, self.in_features), (self._held.up, self.out_features)
        return {(self.seed, part, self.size, n, one.dtype): one for part, (one, n) in enumerate(held)}

    @property
    def rows(self) -> tuple[RandomRows, RandomRows]:
        """What A and Bᵀ follow from; reading it from a GPU waits."""
        counts, weight = self.reinitializations.tolist(), float(self.reinit_weight)
        widths = (self.in_features, self.out_features)
        first, second = (
            RandomRows.of(self.seed, part, self.size, width, counts, weight) for part, width in enumerate(widths)
        )
        return first, second

    def _made(self, dtype: torch.dtype) -> _Held:
        counts = self.reinitializations
        state = counts, version_of(counts)
        if is_symbolic(counts):
            down, up = (counts.new_empty(self.size, n, dtype=dtype) for n in (self.in_features, self.out_features))
            return _Held(*state, None, (), down, up.t())
        rows = self.rows
        masters = tuple(one.matrix() for one in rows)
        down, up = (one.matrix(dtype, counts.device) for one in rows)
        return _Held(*state, rows, masters, down, up.t())

    def renewed(self, chosen: Collection[int], number: int, weight: float) -> Renewal:
        """What the adapter becomes when rows of A and columns of B are re-initialised; nothing is changed yet.

        Args:
            chosen: indices of the rows; there may be none.
            number: the number of the boundary.
            weight: the share of the new row.
        """
        counts, mask = self.reinitializations, torch.zeros(self.size)
        mask[list(chosen)] = 1.0
        after = counts + mask.to(counts)
        buffers = {
            "reinitializations": after,
            "reinit_boundary": torch.full_like(self.reinit_boundary, number),
            "reinit_weight": torch.full_like(self.reinit_weight, weight),
        }
        rows, masters = zip(*(one.reinitialised(chosen, weight) for one in self.rows), strict=True)
        return Renewal(buffers, rows, masters)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._held is not None:
            self.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> SharedAdapter:
        if self._held is None:
            super()._apply(fn, recurse)
            return self
        before = None if is_symbolic(self.reinitializations) else self.reinitializations.clone()
        super()._apply(fn, recurse)
        now = self.reinitializations
        if not is_symbolic(now) and (before is None or not torch.equal(before.cpu(), now.cpu())):
            self._held = None  # as by to_empty, which leaves any numbers until the right ones are loaded
        else:
            self.refresh(fn(self._held.down.new_empty(1)).dtype)
        return self
