"""The forms in which an operator is placed on a host: forward, delta and the choice of the cheapest formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isotune.adapter.operator import DenseOperator, Operator, Rotation, version_of
from isotune.algebra.factors import WIDE, LowRank, frozen_linear, refuse_double_backward
from isotune.parallel.tensor_parallel import Share
from isotune.subspace.pinning import pin

_ALIGNMENT = 16
"""Products with tokens × r results run up to twice as fast on a CPU, and on GPUs too, if r is a multiple of this."""


def mark(tensor: Tensor) -> tuple[int, int]:
    """What tells whether a tensor was replaced or written to since: its identity and its version."""
    return id(tensor), version_of(tensor)


def _aligned(rank: int) -> int:
    """Rows of reader and columns of writer: r, filled up with zeros unless r is tiny."""
    return rank if rank < _ALIGNMENT else -(-rank // _ALIGNMENT) * _ALIGNMENT


def _to_coordinates(x: Tensor, aligned: Tensor, rank: int) -> Tensor:
    """x alignedᵀ without the columns of the filling, (tokens, r)."""
    wide = torch.mm(x, aligned.t())
    return wide if wide.shape[1] == rank else wide[:, :rank]


class _SubspaceUpdate(torch.autograd.Function):
    """residual + ((x readerᵀ) D) writerᵀ, keeping only x readerᵀ (tokens × r) for backward.

    Where x or residual is divided between processes, reader or writer holds this process's columns or rows, and what
    each finds in the r coordinates is a part of their sum. Once that is summed, everything else is whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        difference: Tensor,
        residual: Tensor,
        factors: tuple[Tensor, Tensor],
        of_x: Share | None,
        of_residual: Share | None,
    ) -> Tensor:
        reader, writer = factors
        rank = len(difference)
        coordinates = _to_coordinates(x.reshape(-1, x.shape[-1]), reader, rank).contiguous()
        if of_x is not None:
            coordinates = of_x.total(coordinates)
        ctx.save_for_backward(coordinates, difference)
        ctx.factors, ctx.of_residual = factors, of_residual
        result = residual.clone(memory_format=torch.contiguous_format)
        result.view(len(coordinates), result.shape[-1]).addmm_(torch.mm(coordinates, difference), writer.t()[:rank])
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        coordinates, difference = ctx.saved_tensors
        reader, writer = ctx.factors
        needs_x, needs_difference, needs_residual, *_ = ctx.needs_input_grad
        rank = len(difference)
        read = _to_coordinates(gradient.reshape(-1, gradient.shape[-1]), writer.t(), rank)
        if ctx.of_residual is not None:
            read = ctx.of_residual.total(read)
        grad_difference = torch.mm(coordinates.t(), read) if needs_difference else None
        grad_x = None
        if needs_x:
            grad_x = torch.mm(torch.mm(read, difference.t()), reader[:rank]).view(*gradient.shape[:-1], reader.shape[1])
        return grad_x, grad_difference, gradient if needs_residual else None, None, None, None


class _LinearSubspaceUpdate(torch.autograd.Function):
    """x Wᵀ + b and its subspace update in one node, for a frozen plain linear host.

    With the host inside, the update is accumulated by the matrix product itself instead of in a pass of its own.
    `on_input` adds the update to x, not to y, which is cheaper where in < out: with writer = W readerᵀ,
    x Wᵀ + u D writerᵀ = (x + u D reader) Wᵀ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, difference: Tensor, frozen: tuple[Any, ...]) -> Tensor:
        reader, writer, weight, bias, on_input = frozen
        shape, rank = x.shape, len(difference)
        flat = x.reshape(-1, shape[-1])
        coordinates = _to_coordinates(flat, reader, rank).contiguous()
        ctx.save_for_backward(coordinates, difference)
        ctx.frozen = frozen
        update = torch.mm(coordinates, difference)
        if on_input:
            flat = torch.addmm(flat, update, reader[:rank])
        result, rows = frozen_linear(flat, shape, weight, bias)
        if not on_input:
            rows.addmm_(update, writer.t()[:rank])
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        coordinates, difference = ctx.saved_tensors
        reader, writer, weight, _, on_input = ctx.frozen
        needs_x, needs_difference, _ = ctx.needs_input_grad
        shape, rank = gradient.shape, len(difference)
        flat = gradient.reshape(-1, shape[-1])
        grad_x = torch.mm(flat, weight) if needs_x or on_input else None
        if on_input and grad_x is not None:
            read = _to_coordinates(grad_x, reader, rank)
        else:
            read = _to_coordinates(flat, writer.t(), rank)
        grad_difference = torch.mm(coordinates.t(), read) if needs_difference else None
        if grad_x is None or not needs_x:
            return None, grad_difference, None
        grad_x.addmm_(torch.mm(read, difference.t()), reader[:rank])
        return grad_x.view(*shape[:-1], weight.shape[1]), grad_difference, None


class Form(nn.Module, ABC):
    """How the operator of one adapter changes the matrix W of one host."""

    additive: ClassVar[bool]
    """Whether the adapter adds an output of its own, or else changes the input (and scales the output)."""
    settled = True
    """Whether everything that the form makes from the host's weight is up to date: a cheap test."""
    symbolic = False
    candidates: Tensor | None = None
    """What a solver found beyond the basis, in case that the pin of a file is loaded before the first forward."""

    @abstractmethod
    def fold(self, matrix: Tensor, operator: Operator, rows: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """The matrix with the adapter in it, differentiably, in its own dtype, which should be float32 at least.

        Args:
            matrix: (out, in): W, or what other adapters have made of it.
            operator: of the adapter.
            rows: where `matrix` holds some rows only (an embedding's look-up): these rows of W itself, up to a factor.
            at: (rows,), which rows of W these are.
        """

    @abstractmethod
    def low_rank(self, matrix: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        """Exact factors of the change of W (out, in), (out, r) and (r, in), float32 at least.

        Raises:
            ValueError: the change has no low rank.
        """

    @abstractmethod
    def has_low_rank(self, operator: Operator) -> bool:
        """Whether `low_rank` has an answer."""

    @abstractmethod
    def describe(self, operator: Operator) -> str:
        """A few words for `repr`."""


class InputRotation(Form):
    """The form y = host(x M): merged, W' = W Mᵀ; with a gain, diag(gain) W Mᵀ."""

    additive = False

    def fold(self, matrix: Tensor, operator: Operator, rows: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """diag(gain) W Mᵀ."""
        assert isinstance(operator, Rotation)
        rotated, gain = operator.transposed(matrix), operator.gain
        if gain is None:
            return rotated
        own = gain.to(matrix.dtype)
        return rotated * (own if at is None else own.index_select(0, at))[:, None]

    def low_rank(self, matrix: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        """For reflections, M = I + L R: W Rᵀ and Lᵀ."""
        if not self.has_low_rank(operator):
            raise ValueError(
                "This method rotates all inputs of a layer, so its update has full rank and is no LoRA adapter; export "
                "the merged model instead (--to merged)."
            )
        left, right = operator.tensors()
        return matrix.to(right.dtype) @ right.mT, left.mT

    def has_low_rank(self, operator: Operator) -> bool:
        """Reflections have; all other rotations turn every direction."""
        assert isinstance(operator, Rotation)
        return [type(factor) for factor in operator.chain] == [LowRank] and operator.gain is None

    def describe(self, operator: Operator) -> str:
        """The width that is rotated."""
        return f"rotation of {operator.size}"


class SubspaceUpdate(Form):
    """The form y = host(x) + ((x readerᵀ)(M − I)) writerᵀ of one adapter on one host.

    With V (r, in) the orthonormal basis of the principal subspace, P = W Vᵀ, σᵢ = ‖W vᵢ‖ and the scale s:
    reader = Σᵖ V and writer = s P Σ^(−p), for p from 0 (as in PSOFT) over ½ (PiSSA) to 1 (LoRA-XS).

    What a file holds is `stored`: the pin S = V Ω, (r, p), or V itself. Reader and writer are made from it and from the
    host's weight, are as wide as that weight, and are never stored; in memory they are filled up with zeros to a rank
    that matrix products like.

    Args:
        rank: r.
        in_features: columns of W.
        reader_power: p, how the singular values are split.
        pin_width: p; None stores V itself.
        device: of the stored tensor.

    Source: Wu et al., PSOFT (ICLR 2026), equations 6–8; Meng et al., PiSSA (2024), for the even split;
        Balazy et al., LoRA-XS (2024), for all of them on the side of the input.
    """

    additive = True
    pin: Tensor | None
    basis: Tensor | None
    aligned_reader: Tensor | None
    aligned_writer: Tensor | None

    def __init__(
        self, rank: int, in_features: int, *, reader_power: float, pin_width: int | None, device: torch.device
    ) -> None:
        super().__init__()
        self.rank = rank
        self.reader_power = reader_power
        self.embedded = pin_width is None
        columns = in_features if pin_width is None else pin_width
        # Zero stands for "not found yet": no basis and no sketch of one is zero.
        stored = torch.zeros(rank, columns, device=device)
        self.register_buffer("pin", None if self.embedded else stored)
        self.register_buffer("basis", stored if self.embedded else None)
        self.register_buffer("aligned_reader", None, persistent=False)
        self.register_buffer("aligned_writer", None, persistent=False)
        self.scale = 1.0
        self.residual = 0.0
        self.solved_here = False
        self.symbolic = False
        self._plain = False
        self._accepted: Tensor | None = None
        self._seen: tuple[int, int] | None = None

    # -- what the file holds, and whether it is what reader and writer were made from -----------------------------

    @property
    def stored(self) -> Tensor:
        """The pin, (r, p), or with `embedded` the basis, (r, in); float32."""
        stored = self._buffers["basis" if self.embedded else "pin"]
        assert stored is not None
        return stored

    @stored.setter
    def stored(self, value: Tensor) -> None:
        self._buffers["basis" if self.embedded else "pin"] = value

    @property
    def reader(self) -> Tensor | None:
        """(r, in), in the dtype of the host's weight; None until placed."""
        return None if self.aligned_reader is None else self.aligned_reader[: self.rank]

    @property
    def writer(self) -> Tensor | None:
        """(out, r), in the dtype of the host's weight; None until placed."""
        return None if self.aligned_writer is None else self.aligned_writer[:, : self.rank]

    def _mark(self) -> tuple[int, int]:
        return mark(self.stored)

    @property
    def settled(self) -> bool:  # type: ignore[override]
        """Whether reader and writer are there and nothing has touched the stored tensor since: a cheap test."""
        return self._buffers["aligned_reader"] is not None and self._seen == self._mark()

    def needs_placing(self) -> bool:
        """Whether reader and writer must be made (again): they are missing, or the stored tensor has other values."""
        if self.aligned_reader is None or self.symbolic or self._accepted is None:
            return True
        stored = self.stored
        same = stored.shape == self._accepted.shape and torch.equal(self._accepted.to(stored), stored)
        if same:
            self._seen = self._mark()
        return not same

    def holds_foreign_basis(self) -> bool:
        """Whether the stored tensor came from elsewhere (a file), and is not empty."""
        stored = self.stored
        if stored.is_meta or not bool(stored.any()):
            return False
        return self._accepted is None or not torch.equal(self._accepted.to(stored), stored)

    def forget(self, *, stored: bool) -> None:
        """Drop reader and writer since the host's weight has changed, and with `stored` what was recorded of V."""
        self.aligned_reader = self.aligned_writer = self.candidates = self._accepted = None
        if stored:
            self.stored.zero_()

    # -- placing -----------------------------------------------------------------------------------------------

    def adopt(self, subspace: Tensor, matrix: Tensor, scale: float, seed: int) -> None:
        """Take the first r rows of a freshly solved subspace as the basis, and record them in `stored`.

        Args:
            subspace: (k, in), k ≥ r, float32 or wider; what exceeds r is kept until the first forward, in case that
                the pin of a file is loaded.
            matrix: W, (out, in).
            scale: s.
            seed: of the pin's Gaussian matrix.
        """
        basis = subspace[: self.rank].clone()
        value = basis if self.embedded else pin(basis, seed=seed)
        if self.stored.is_meta:
            self.stored = torch.empty_like(self.stored, device=matrix.device)
        self.stored.copy_(value)
        self.place(basis, matrix, scale)
        self.solved_here = True
        self.candidates = None if self.embedded else subspace

    def adopt_foreign(self, basis: Tensor, matrix: Tensor, scale: float, seed: int) -> None:
        """Take a basis (r, in) that need not be the principal one, such as another library's, and record it."""
        self.adopt(basis, matrix, scale, seed)
        # Neither may another adapter take it over, nor does it hold what the pin of a file could be found in.
        self.solved_here, self.candidates = False, None

    def adopt_twin(self, twin: SubspaceUpdate, matrix: Tensor, scale: float) -> None:
        """Take the basis of an adapter of equal rank on the same weight, and its very tensors where they agree."""
        if self.stored.is_meta:
            self.stored = torch.empty_like(self.stored, device=matrix.device)
        self.stored.copy_(twin.stored)
        self.aligned_reader, self.aligned_writer = twin.aligned_reader, twin.aligned_writer
        self.scale, self._plain, self.solved_here = twin.scale, twin._plain, True
        self._settle()
        self.rescale(scale)

    def take(self, other: SubspaceUpdate, *, in_place: bool) -> None:
        """Take over basis, reader and writer of a placed form of the same shapes, which is given up.

        Args:
            other: on the same host.
            in_place: copy into the tensors that are here already, which must be nobody else's.
        """
        self.stored.copy_(other.stored)
        for name in ("aligned_reader", "aligned_writer"):
            if in_place:
                self._buffers[name].copy_(other._buffers[name])  # type: ignore[union-attr, arg-type]
            else:
                self._buffers[name] = other._buffers[name]
        self.scale, self.residual = other.scale, other.residual
        self.solved_here, self.candidates = False, None
        self._settle()

    def place(self, basis: Tensor, matrix: Tensor, scale: float) -> None:
        """Fix reader and writer for a basis on a host.

        Args:
            basis: V, (r, in), float32 or wider, orthonormal rows.
            matrix: W, (out, in); its dtype and device become those of reader and writer.
            scale: s, the factor of the update.
        """
        basis = basis.to(device=matrix.device, dtype=torch.promote_types(matrix.dtype, torch.float32))
        projection = matrix.to(basis.dtype) @ basis.T
        reader = basis
        if self.reader_power:
            values = torch.linalg.vector_norm(projection, dim=0).clamp_min(torch.finfo(basis.dtype).tiny)
            values = values.pow(self.reader_power)
            reader, projection = basis * values[:, None], projection / values
        filling = _aligned(self.rank) - self.rank
        scaled = projection * scale if scale != 1.0 else projection
        self.aligned_reader = nn.functional.pad(reader.to(matrix), (0, 0, 0, filling)).contiguous()
        self.aligned_writer = nn.functional.pad(scaled.to(matrix), (0, filling)).contiguous()
        self.scale, self.solved_here, self.candidates = scale, False, None
        self._settle()

    def place_symbolic(self, matrix: Tensor, scale: float) -> None:
        """Give reader and writer their shapes on a weight that has no values yet; placed again when it has."""
        self.aligned_reader = matrix.new_zeros(_aligned(self.rank), matrix.shape[1])
        self.aligned_writer = matrix.new_zeros(matrix.shape[0], _aligned(self.rank))
        self.scale = scale
        self._settle()
        self.symbolic = True
        self._accepted = None

    def rescale(self, scale: float) -> None:
        """Change s."""
        if scale == self.scale:
            return
        if scale == 0.0 or self.aligned_writer is None:
            raise ValueError("A scale of 0 would lose the adapter; use disable_adapter() or set_adapter() instead.")
        self.aligned_writer = self.aligned_writer * (scale / self.scale)
        self.scale = scale
        self._settle()

    def _settle(self) -> None:
        # Only then is writer = W readerᵀ, on which the formula for in < out rests.
        self._plain = not self.reader_power and self.scale == 1.0
        self._accepted = self.stored.clone()
        self._seen = self._mark()
        self.symbolic = False

    def _apply(self, fn: Any, recurse: bool = True) -> SubspaceUpdate:
        # What the file will hold stays float32 whatever the model is cast to; it only moves between devices.
        before = self.stored
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.stored.dtype != before.dtype:
            self.stored = before.to(self.stored.device)
        return self

    # -- the update --------------------------------------------------------------------------------------------

    def update(
        self,
        x: Tensor,
        difference: Tensor,
        residual: Tensor,
        of_x: Share | None = None,
        of_residual: Share | None = None,
    ) -> Tensor:
        """residual + ((x readerᵀ)(M − I)) writerᵀ, in the dtype of `residual`, for any host and any input.

        Args:
            x: (..., in), or with `of_x` this process's share of its columns.
            difference: M − I, (r, r).
            residual: (..., out), or with `of_residual` this process's share of its columns.
        """
        dtype = residual.dtype
        reader, writer = self._factors(dtype)
        if of_x is not None:
            reader = reader[:, of_x.span]
        if of_residual is not None:
            writer = writer[of_residual.span]
        result: Tensor = _SubspaceUpdate.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), difference, residual, (reader, writer), of_x, of_residual
        )
        return result

    def linear(self, x: Tensor, difference: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b with its update, for a frozen plain linear host whose dtype x has."""
        # The update of the input saves work where in < out. It needs ∂L/∂(x), which a first layer does not compute,
        # and in half precision a small update would be rounded away in x, so both keep the update of the output.
        on_input = (
            self._plain
            and weight.shape[1] < weight.shape[0]
            and x.dtype in WIDE
            and (x.requires_grad or not torch.is_grad_enabled())
        )
        frozen = (*self._factors(x.dtype), weight, bias, on_input)
        result: Tensor = _LinearSubspaceUpdate.apply(x, difference, frozen)  # type: ignore[no-untyped-call]
        return result

    def delta(self, difference: Tensor) -> Tensor:
        """The change of W, (out, in): writer (M − I)ᵀ reader, in float32 at least."""
        up, down = self.factors(difference)
        return up @ down

    def factors(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Exact factors of the change of W, (out, r) and (r, in), in float32 at least."""
        reader, writer = self.reader, self.writer
        assert reader is not None
        assert writer is not None
        wide = torch.promote_types(reader.dtype, torch.float32)
        return writer.to(wide) @ difference.to(wide).T, reader.to(wide)

    def fold(self, matrix: Tensor, operator: Operator, rows: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """W + writer (M − I)ᵀ reader."""
        assert isinstance(operator, DenseOperator)
        difference = operator.difference(matrix.dtype)
        if rows is None:
            return matrix + self.delta(difference).to(matrix.dtype)
        # Rows of writer = s W readerᵀ, divided where the singular values are split; so that whatever the look-up
        # multiplies the rows of W by, it multiplies their update by too.
        assert self.reader is not None
        reader = self.reader.to(matrix.dtype)
        writer = rows @ (reader * (self.scale / reader.square().sum(1, keepdim=True))).T
        return torch.addmm(matrix, writer @ difference.T, reader)

    def low_rank(self, matrix: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        """writer (M − I)ᵀ and reader."""
        assert isinstance(operator, DenseOperator)
        return self.factors(operator.difference())

    def has_low_rank(self, operator: Operator) -> bool:
        """Always."""
        return True

    def describe(self, operator: Operator) -> str:
        """The rank."""
        return f"rank {self.rank}"

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Buffers by their dictionary: a module's attribute look-up costs as much as launching an operation.
        reader, writer = self._buffers["aligned_reader"], self._buffers["aligned_writer"]
        assert reader is not None
        assert writer is not None
        if reader.dtype != dtype:
            return reader.to(dtype), writer.to(dtype)
        return reader, writer
