"""The autograd nodes of all forms: each saves as little as possible for backward, and can be differentiated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from isotune.adapter.evaluation import is_recorded, without_autocast
from isotune.adapter.operator import Base
from isotune.algebra.acceleration import kernels_for
from isotune.algebra.factors import Chain, chain_backward, chain_forward, refuse_double_backward
from isotune.algebra.recording import is_plain
from isotune.parallel.tensor_parallel import UNSPLIT, Shares
from isotune.subspace.precision import exact_product, reduces_float32


def frozen_linear(flat: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """flat Wᵀ + b without a graph, as (..., out) and as a view (tokens, out); flat is (tokens, in), from `shape`.

    The result is allocated in its final shape and filled through the view: if it were a view itself, later operations
    such as ReLU(inplace=True) could not change it in place.
    """
    result = flat.new_empty(*shape[:-1], weight.shape[0])
    rows = result.view(flat.shape[0], weight.shape[0])
    if bias is None:
        torch.mm(flat, weight.t(), out=rows)
    else:
        torch.addmm(bias, flat, weight.t(), out=rows)
    return result, rows


def weight_of(base: Base) -> Tensor | None:
    """W of a layer that is computed inside of a node; None if only its output is given."""
    return None if isinstance(base, Tensor) else base[0]


def output_with(flat: Tensor, shape: Sequence[int], base: Base, left: Tensor, right: Tensor) -> Tensor:
    """The update left · right added to what is below it, in new memory: to an output, or to x Wᵀ + b."""
    if isinstance(base, Tensor):
        result = base.clone(memory_format=torch.contiguous_format)
        rows = result.view(len(flat), result.shape[-1])
    else:
        result, rows = frozen_linear(flat, shape, *base)
    if rows.dtype == left.dtype:
        rows.addmm_(left, right)
    else:  # under autocast, of a layer whose output has another dtype, as of bitsandbytes
        rows.add_(torch.mm(left, right))
    return result


def input_gradient(gradient: Tensor, weight: Tensor | None, read: Tensor, down: Tensor) -> Tensor:
    """The gradient of x: that through the update, read · down, and that through W if the layer is inside the node."""
    if weight is None:
        flat = torch.mm(read, down)
    else:
        flat = torch.mm(gradient.reshape(-1, gradient.shape[-1]), weight).addmm_(read, down)
    return flat.view(*gradient.shape[:-1], down.shape[1])


class _SubspaceUpdate(torch.autograd.Function):
    """`subspace_update`, saving only x downᵀ (tokens × r) for backward.

    If x or the result is tensor-parallel, down or up holds this process's columns or rows, and each process has one
    summand of the r coordinates. Once these are summed, everything else is complete.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        difference: Tensor,
        base: Base,
        factors: tuple[Tensor, Tensor],
        shares: Shares,
    ) -> Tensor:
        (down, up), (of_x, of_result) = factors, shares
        flat = x.reshape(-1, x.shape[-1])
        coordinates = of_x.total(torch.mm(flat, down.t()))
        ctx.save_for_backward(coordinates, difference)
        ctx.frozen = down, up, weight_of(base), of_result
        return output_with(flat, x.shape, base, torch.mm(coordinates, difference), up.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        coordinates, difference = ctx.saved_tensors
        down, up, weight, of_result = ctx.frozen
        needs_x, needs_difference, needs_base, *_ = ctx.needs_input_grad
        read = of_result.total(torch.mm(gradient.reshape(-1, gradient.shape[-1]).to(up.dtype), up))
        grad_x = input_gradient(gradient, weight, torch.mm(read, difference.t()), down) if needs_x else None
        grad_difference = torch.mm(coordinates.t(), read) if needs_difference else None
        return grad_x, grad_difference, gradient if needs_base else None, None, None


def subspace_update(
    x: Tensor,
    difference: Tensor,
    base: Base,
    factors: tuple[Tensor, Tensor],
    shares: Shares = UNSPLIT,
) -> Tensor:
    """Add a subspace update to the output of any layer, or compute a frozen linear layer with its update in one node.

    With the layer inside, the matrix product itself accumulates the update, which needs no pass of its own.

    Args:
        x: (..., in), or this process's share of its columns.
        difference: D, M − I times the scale, padded with zeros like the factors.
        base: the layer's own output, or this process's share of its columns, or the linear layer; this one in the dtype
            of x.
        factors: down (r or more, in) and up (out, r or more), in the dtype of x and cut to the shares.
        shares: those of x and of the output under tensor parallelism.

    Returns:
        base + ((x downᵀ) D) upᵀ, differentiable once.
    """
    if is_plain():
        assert isinstance(base, Tensor)
        down, up = factors
        return base + x @ down.t() @ difference @ up.t()
    result: Tensor = _SubspaceUpdate.apply(x, difference, base, factors, shares)  # type: ignore[no-untyped-call]
    return result


class _LowRankUpdate(torch.autograd.Function):
    """`low_rank_update`, saving x, as LoRA does, and x downᵀ (tokens × r) for backward.

    If x or the result is tensor-parallel, down or up holds this process's columns or rows, as in `_SubspaceUpdate`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Base, shares: Shares) -> Tensor:
        of_x, of_result = shares
        flat = x.reshape(-1, x.shape[-1])
        coordinates = of_x.total(torch.mm(flat, down.t()))
        ctx.save_for_backward(x, coordinates, down, up)
        ctx.weight, ctx.of_result = weight_of(base), of_result
        return output_with(flat, x.shape, base, coordinates, up.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, coordinates, down, up = ctx.saved_tensors
        needs_x, needs_down, needs_up, needs_base, *_ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1]).to(up.dtype)
        read = ctx.of_result.total(torch.mm(flat, up))
        grad_down = torch.mm(read.t(), x.reshape(-1, x.shape[-1])) if needs_down else None
        grad_up = torch.mm(flat.t(), coordinates) if needs_up else None
        grad_x = input_gradient(gradient, ctx.weight, read, down) if needs_x else None
        return grad_x, grad_down, grad_up, gradient if needs_base else None, None


def low_rank_update(x: Tensor, down: Tensor, up: Tensor, base: Base, shares: Shares) -> Tensor:
    """Add an update with trained factors, as `subspace_update` adds one with frozen factors.

    Args:
        x, base, shares: as there.
        down, up: (r, in) and (out, r), times the scale, in the dtype of x and cut to the shares.

    Returns:
        base + (x downᵀ) upᵀ, differentiable once.
    """
    if is_plain():
        assert isinstance(base, Tensor)
        return base + x @ down.t() @ up.t()
    result: Tensor = _LowRankUpdate.apply(x, down, up, base, shares)  # type: ignore[no-untyped-call]
    return result


class _Complement(torch.autograd.Function):
    """factor − (factor Bᵀ) B for a frozen basis B (k, n) with orthonormal rows: symmetric, so backward is the same map.

    It saves no tensors, so that it can be differentiated any number of times.
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor, basis: Tensor) -> Tensor:
        ctx.basis = basis
        return _complement(factor, basis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        refuse_double_backward()
        return _complement(gradient, ctx.basis), None


def _complement(factor: Tensor, basis: Tensor) -> Tensor:
    with without_autocast(factor):
        if factor.ndim == 2 and not (factor.dtype == torch.float32 and reduces_float32(factor.device)):
            return torch.addmm(factor, torch.mm(factor, basis.t()), basis, alpha=-1)
        return factor - exact_product(exact_product(factor, basis.mT), basis)


def complement(factor: Tensor, basis: Tensor) -> Tensor:
    """The part of each row of a factor that is orthogonal to a frozen basis, in full float32 whatever the settings.

    Args:
        factor: (..., r, n), at least float32.
        basis: B, (k, n) or with the same leading dimensions, orthonormal rows, in the dtype of the factor.

    Returns:
        factor (I − Bᵀ B), of the same shape.
    """
    if is_recorded():  # which can hold neither this node nor a look at the settings
        for _ in range(2):  # the second time takes out what fast products leave
            factor = factor - (factor @ basis.mT) @ basis
        return factor
    result: Tensor = _Complement.apply(factor, basis)  # type: ignore[no-untyped-call]
    return result


def update_of_one_token(
    x: Tensor,
    base: Base,
    factors: tuple[Tensor, Tensor],
    acting: Callable[[], tuple[Tensor, Tensor]],
) -> Tensor | None:
    """x Wᵀ + b and its update for one token x (..., in), in two launches; None if that is not available.

    Args:
        x: as in `subspace_update`.
        base: as there; without W nothing is computed.
        factors: down and up, of the shapes of those that act.
        acting: makes down and up with all that stands between them.
    """
    kernels = None if torch.is_grad_enabled() else kernels_for(x, "decoding_kernels")
    if kernels is None or isinstance(base, Tensor) or x.numel() != x.shape[-1]:
        return None
    row = x.reshape(1, -1)
    if not kernels.can_multiply(row, *base, *factors):
        return None
    found: Tensor | None = kernels.linear_with_update(row, *base, *acting())
    return None if found is None else found.view(*x.shape[:-1], found.shape[-1])


class _RotatedLinear(torch.autograd.Function):
    """diag(gain) applied to chain(x) Wᵀ, plus bias, for a frozen W and bias; saves only x.

    The gradient of a gain needs chain(x) Wᵀ again. Saving it would cost tokens × out; recomputing it costs one product.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        # Unnamed arguments: a trace takes a forward called with as many arguments as it names for one without ctx.
        x, gain, chain, (weight, bias), *tensors = given
        ctx.save_for_backward(x, gain, *tensors)
        ctx.chain, ctx.weight = chain, weight
        rotated = chain_forward(x.reshape(-1, x.shape[-1]), chain, tensors)
        bias = None if bias is None else bias.to(x.dtype)
        result, rows = frozen_linear(rotated, x.shape, weight.to(x.dtype), bias)
        if gain is not None:
            # The gain stays in float32, so the product is rounded once and a gain of one changes no bit. With a bias,
            # add what the gain changes in the layer's own output.
            rows.mul_(gain) if bias is None else rows.addcmul_(rows - bias, (gain - 1).to(x.dtype))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, gain, *tensors = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        weight, grad_gain = ctx.weight.to(x.dtype), None
        if ctx.needs_input_grad[1]:
            grad, grad_gain = _gain_backward(torch.mm(chain_forward(flat, ctx.chain, tensors), weight.t()), grad, gain)
        elif gain is not None:
            grad = torch.mul(grad, gain, out=torch.empty_like(grad))  # in grad's dtype; the gain's is wider
        inner = torch.mm(grad, weight)
        grad_x, grads = chain_backward(flat, inner, ctx.chain, tensors, ctx.needs_input_grad[0], in_place=True)
        return None if grad_x is None else grad_x.reshape(x.shape), grad_gain, None, None, *grads


def _gain_backward(rows: Tensor, gradient: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `rows`, written in their place, and of their gain, from that of gain ⊙ rows."""
    if (kernels := kernels_for(rows, "gain_kernels")) and kernels.can_scale(rows, gradient, gain):
        found: Tensor | None = kernels.gain_backward(rows, gradient, gain)
        if found is not None:
            return rows, found
    grad_gain = rows.mul_(gradient).sum(0, dtype=gain.dtype)
    return torch.mul(gradient, gain, out=rows), grad_gain


def rotated_linear(
    x: Tensor, gain: Tensor | None, chain: Chain, tensors: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """gain ⊙ (chain(x) Wᵀ) + bias for a frozen layer.

    Args:
        x: (..., in).
        gain: (out,), at least float32, or None.
        chain, tensors: as in `isotune.algebra.factors.apply_chain`, on `in` coordinates.
        weight: W, (out, in), not trained, of any dtype; multiplied in the dtype of x.
        bias: (out,), not trained, or None.

    Returns:
        (..., out); differentiable once. For backward, x itself is saved and nothing else of that size.
    """
    result: Tensor = _RotatedLinear.apply(x, gain, chain, (weight, bias), *tensors)  # type: ignore[no-untyped-call]
    return result
