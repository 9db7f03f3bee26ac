"""The forms in which an operator is placed on a host: forward, delta and the choice of the cheapest formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.pinning import pin


class _SubspaceUpdate(torch.autograd.Function):
    """residual + ((x readerᵀ) D) writerᵀ, keeping only x readerᵀ (tokens × r) for backward.

    `residual=None` stands for x itself, which turns the update of an output into a change of an input.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, difference: Tensor, reader: Tensor, writer: Tensor, residual: Tensor | None
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        coordinates = flat @ reader.T
        base = flat if residual is None else residual.reshape(-1, residual.shape[-1])
        ctx.to_input = residual is None
        ctx.save_for_backward(coordinates, difference, reader, writer)
        result = torch.addmm(base, coordinates @ difference, writer.T)
        return result.view(*x.shape[:-1], writer.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coordinates, difference, reader, writer = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        read = flat @ writer
        grad_difference = coordinates.T @ read if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            back = read @ difference.T
            grad_x = torch.addmm(flat, back, reader) if ctx.to_input else back @ reader
            grad_x = grad_x.view(*gradient.shape[:-1], reader.shape[1])
        return grad_x, grad_difference, None, None, gradient if ctx.needs_input_grad[4] else None


class _LinearSubspaceUpdate(torch.autograd.Function):
    """x Wᵀ + b and its subspace update in one node, for a frozen plain linear host.

    With the host inside, the update is accumulated by the matrix product itself instead of in a pass of its own.
    `on_input` adds the update to x, not to y, which is cheaper where in < out: with writer = W readerᵀ,
    x Wᵀ + u D writerᵀ = (x + u D reader) Wᵀ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        difference: Tensor,
        reader: Tensor,
        writer: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        on_input: bool,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        coordinates = flat @ reader.T
        update = coordinates @ difference
        if on_input:
            flat = torch.addmm(flat, update, reader)
        result = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        if not on_input:
            result.addmm_(update, writer.T)
        ctx.on_input = on_input
        ctx.save_for_backward(coordinates, difference, reader, writer, weight)
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coordinates, difference, reader, writer, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        needs_x = ctx.needs_input_grad[0]
        grad_x = flat @ weight if needs_x or ctx.on_input else None
        read = grad_x @ reader.T if ctx.on_input else flat @ writer
        grad_difference = coordinates.T @ read if ctx.needs_input_grad[1] else None
        if needs_x:
            assert grad_x is not None
            grad_x.addmm_(read @ difference.T, reader)
            grad_x = grad_x.view(*gradient.shape[:-1], weight.shape[1])
        return grad_x if needs_x else None, grad_difference, None, None, None, None, None


class SubspaceUpdate(nn.Module):
    """The form y = host(x) + ((x readerᵀ)(M − I)) writerᵀ of one adapter on one host.

    With V (r, in) the orthonormal basis of the principal subspace, P = W Vᵀ and the scale s: reader = V, writer = s P
    (`symmetric=False`), or with the singular values split evenly between the two (`symmetric=True`, as in PiSSA):
    reader = Σ^½ V, writer = s P Σ^(−½), where σᵢ = ‖W vᵢ‖.

    What a file holds is `stored`: the pin S = V Ω, (r, p), or V itself. Reader and writer are made from it and from the
    host's weight, are as wide as that weight, and are never stored.

    Args:
        rank: r.
        in_features: columns of W.
        symmetric: how the singular values are split.
        pin_width: p; None stores V itself.
        device: of the stored tensor.

    Source: Wu et al., PSOFT (ICLR 2026), equations 6–8; Meng et al., PiSSA (2024), for the symmetric split.
    """

    pin: Tensor | None
    basis: Tensor | None
    reader: Tensor | None
    writer: Tensor | None

    def __init__(
        self, rank: int, in_features: int, *, symmetric: bool, pin_width: int | None, device: torch.device
    ) -> None:
        super().__init__()
        self.rank = rank
        self.symmetric = symmetric
        self.embedded = pin_width is None
        columns = in_features if pin_width is None else pin_width
        # Zero stands for "not found yet": no basis and no sketch of one is zero.
        stored = torch.zeros(rank, columns, device=device)
        self.register_buffer("pin", None if self.embedded else stored)
        self.register_buffer("basis", stored if self.embedded else None)
        self.register_buffer("reader", None, persistent=False)
        self.register_buffer("writer", None, persistent=False)
        self.scale = 1.0
        self.residual = 0.0
        self.solved_here = False
        self.symbolic = False
        self.candidates: Tensor | None = None
        self._plain = False
        self._accepted: Tensor | None = None
        self._seen: tuple[int, int] | None = None

    # -- what the file holds, and whether it is what reader and writer were made from -----------------------------

    @property
    def stored(self) -> Tensor:
        """The pin, (r, p), or with `embedded` the basis, (r, in); float32."""
        stored = self.basis if self.embedded else self.pin
        assert stored is not None
        return stored

    @stored.setter
    def stored(self, value: Tensor) -> None:
        self._buffers["basis" if self.embedded else "pin"] = value

    def _mark(self) -> tuple[int, int]:
        return id(self.stored), self.stored._version

    @property
    def settled(self) -> bool:
        """Whether reader and writer are there and nothing has touched the stored tensor since: a cheap test."""
        return self.reader is not None and self._seen == self._mark()

    def needs_placing(self) -> bool:
        """Whether reader and writer must be made (again): they are missing, or the stored tensor has other values."""
        if self.reader is None or self.symbolic or self._accepted is None:
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
        self.reader = self.writer = self.candidates = self._accepted = None
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

    def adopt_twin(self, twin: SubspaceUpdate, matrix: Tensor, scale: float) -> None:
        """Take the basis of an adapter of equal rank on the same weight, and its very tensors where they agree."""
        assert twin.reader is not None
        if self.stored.is_meta:
            self.stored = torch.empty_like(self.stored, device=matrix.device)
        self.stored.copy_(twin.stored)
        self.reader, self.writer = twin.reader, twin.writer
        self.scale, self._plain, self.solved_here = twin.scale, twin._plain, True
        self._settle()
        self.rescale(scale)

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
        if self.symmetric:
            values = torch.linalg.vector_norm(projection, dim=0).clamp_min(torch.finfo(basis.dtype).tiny).sqrt()
            reader, projection = basis * values[:, None], projection / values
        self.reader = reader.to(matrix).contiguous()
        self.writer = (projection * scale if scale != 1.0 else projection).to(matrix).contiguous()
        self.scale, self.solved_here, self.candidates = scale, False, None
        self._settle()

    def place_symbolic(self, matrix: Tensor, scale: float) -> None:
        """Give reader and writer their shapes on a weight that has no values yet; placed again when it has."""
        self.reader = matrix.new_empty(self.rank, matrix.shape[1])
        self.writer = matrix.new_empty(matrix.shape[0], self.rank)
        self.scale = scale
        self._settle()
        self.symbolic = True
        self._accepted = None

    def rescale(self, scale: float) -> None:
        """Change s."""
        if scale == self.scale:
            return
        if scale == 0.0 or self.writer is None:
            raise ValueError("A scale of 0 would lose the adapter; use disable_adapter() or set_adapter() instead.")
        self.writer = self.writer * (scale / self.scale)
        self.scale = scale
        self._settle()

    def _settle(self) -> None:
        # Only then is writer = W readerᵀ, on which the formula for in < out rests.
        self._plain = not self.symmetric and self.scale == 1.0
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

    def update(self, x: Tensor, difference: Tensor, residual: Tensor) -> Tensor:
        """residual + ((x readerᵀ)(M − I)) writerᵀ, in the dtype of `residual`, for any host and any input."""
        dtype = residual.dtype
        reader, writer = self._factors(dtype)
        result: Tensor = _SubspaceUpdate.apply(x.to(dtype), difference, reader, writer, residual)  # type: ignore[no-untyped-call]
        return result

    def linear(self, x: Tensor, difference: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b with its update, for a frozen plain linear host whose dtype x has."""
        reader, writer = self._factors(x.dtype)
        # The update of the input saves work where in < out. It needs ∂L/∂(x), which a first layer does not compute,
        # and in half precision a small update would be rounded away in x, so both keep the update of the output.
        on_input = (
            self._plain
            and x.dtype in (torch.float32, torch.float64)
            and weight.shape[1] < weight.shape[0]
            and (x.requires_grad or not torch.is_grad_enabled())
        )
        result: Tensor = _LinearSubspaceUpdate.apply(x, difference, reader, writer, weight, bias, on_input)  # type: ignore[no-untyped-call]
        return result

    def delta(self, difference: Tensor) -> Tensor:
        """The change of W, (out, in): writer (M − I)ᵀ reader, in float32 at least."""
        up, down = self.low_rank(difference)
        return up @ down

    def low_rank(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Exact factors of the change of W, (out, r) and (r, in), in float32 at least."""
        reader, writer = self._factors(None)
        wide = torch.promote_types(reader.dtype, torch.float32)
        return writer.to(wide) @ difference.to(wide).T, reader.to(wide)

    def _factors(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        assert self.reader is not None
        assert self.writer is not None
        if dtype is None:
            return self.reader, self.writer
        return self.reader.to(dtype), self.writer.to(dtype)
