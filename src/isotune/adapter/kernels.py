"""The autograd nodes of all forms: each saves as little as possible for backward, and can be differentiated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isotune.adapter.evaluation import is_recorded, without_autocast
from isotune.algebra.acceleration import kernels_for
from isotune.algebra.factors import Chain, chain_backward, chain_forward, refuse_double_backward
from isotune.algebra.recording import is_exported
from isotune.parallel.tensor_parallel import Share
from isotune.subspace.precision import exact_product, reduces_float32


def frozen_linear(flat: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """flat Wᵀ + b without a graph, as (..., out) and as a view (tokens, out); flat is (tokens, in), from `shape`.

    The result is allocated in its final shape and filled through the view: if it were a view itself, later operations
    such as ReLU(inplace=True) could not change it in place.
    """
    result = flat.new_empty(*shape[:-1], weight.shape[0])
    rows = result.view(len(flat), weight.shape[0])
    if bias is None:
        torch.mm(flat, weight.t(), out=rows)
    else:
        torch.addmm(bias, flat, weight.t(), out=rows)
    return result, rows


class _SubspaceUpdate(torch.autograd.Function):
    """residual + ((x downᵀ) D) upᵀ, saving only x downᵀ (tokens × r) for backward.

    If x or residual is tensor-parallel, down or up holds this process's columns or rows, and each process has one
    summand of the r coordinates. Once these are summed, everything else is complete.
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
        down, up = factors
        coordinates = torch.mm(x.reshape(-1, x.shape[-1]), down.t())
        if of_x is not None:
            coordinates = of_x.total(coordinates)
        ctx.save_for_backward(coordinates, difference)
        ctx.factors, ctx.of_residual = factors, of_residual
        result = residual.clone(memory_format=torch.contiguous_format)
        result.view(len(coordinates), result.shape[-1]).addmm_(torch.mm(coordinates, difference), up.t())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        coordinates, difference = ctx.saved_tensors
        down, up = ctx.factors
        needs_x, needs_difference, needs_residual, *_ = ctx.needs_input_grad
        read = torch.mm(gradient.reshape(-1, gradient.shape[-1]), up)
        if ctx.of_residual is not None:
            read = ctx.of_residual.total(read)
        grad_difference = torch.mm(coordinates.t(), read) if needs_difference else None
        grad_x = None
        if needs_x:
            grad_x = torch.mm(torch.mm(read, difference.t()), down).view(*gradient.shape[:-1], down.shape[1])
        return grad_x, grad_difference, gradient if needs_residual else None, None, None, None


def subspace_update(
    x: Tensor,
    difference: Tensor,
    residual: Tensor,
    factors: tuple[Tensor, Tensor],
    of_x: Share | None = None,
    of_residual: Share | None = None,
) -> Tensor:
    """Add a subspace update to the output of any layer.

    Args:
        x: (..., in), or with `of_x` this process's share of its columns.
        difference: M − I times the scale, padded with zeros like the factors.
        residual: (..., out), the layer's own output, or with `of_residual` this process's share of its columns.
        factors: down (r or more, in) and up (out, r or more), in the dtype of `residual` and cut to the shares.
        of_x, of_residual: this process's shares under tensor parallelism; None for whole tensors.

    Returns:
        residual + ((x downᵀ) D) upᵀ, differentiable once.
    """
    if is_exported():
        down, up = factors
        return residual + x @ down.t() @ difference @ up.t()
    result: Tensor = _SubspaceUpdate.apply(x, difference, residual, factors, of_x, of_residual)  # type: ignore[no-untyped-call]
    return result


class _LinearSubspaceUpdate(torch.autograd.Function):
    """x Wᵀ + b and its subspace update in one node, for a frozen plain linear layer.

    With the layer inside, the matrix product itself accumulates the update, which needs no pass of its own. `on_input`
    adds the update to x instead of y, which is cheaper if in < out: with up = W downᵀ,
    x Wᵀ + u D upᵀ = (x + u D down) Wᵀ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, difference: Tensor, frozen: tuple[Any, ...]) -> Tensor:
        down, up, weight, bias, on_input = frozen
        shape = x.shape
        flat = x.reshape(-1, shape[-1])
        coordinates = torch.mm(flat, down.t())
        ctx.save_for_backward(coordinates, difference)
        ctx.frozen = frozen
        update = torch.mm(coordinates, difference)
        if on_input:
            flat = torch.addmm(flat, update, down)
        result, rows = frozen_linear(flat, shape, weight, bias)
        if not on_input:
            rows.addmm_(update, up.t())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        coordinates, difference = ctx.saved_tensors
        down, up, weight, _, on_input = ctx.frozen
        needs_x, needs_difference, _ = ctx.needs_input_grad
        shape = gradient.shape
        flat = gradient.reshape(-1, shape[-1])
        grad_x = torch.mm(flat, weight) if needs_x or on_input else None
        on_input = on_input and grad_x is not None
        read = torch.mm(grad_x, down.t()) if on_input else torch.mm(flat, up)  # type: ignore[arg-type]
        grad_difference = torch.mm(coordinates.t(), read) if needs_difference else None
        if grad_x is None or not needs_x:
            return None, grad_difference, None
        grad_x.addmm_(torch.mm(read, difference.t()), down)
        return grad_x.view(*shape[:-1], weight.shape[1]), grad_difference, None


def linear_with_update(
    x: Tensor,
    difference: Tensor,
    factors: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    *,
    on_input: bool,
) -> Tensor:
    """x Wᵀ + b with its subspace update, for frozen W and b of the same dtype as x.

    Args:
        x: (..., in).
        difference: M − I times the scale, padded with zeros like the factors.
        factors: down (r or more, in) and up (out, r or more), in the dtype of x.
        weight: W, (out, in).
        bias: (out,), or None.
        on_input: add the update to x, which is only equivalent if up = W downᵀ.

    Returns:
        (..., out), differentiable once.
    """
    result: Tensor = _LinearSubspaceUpdate.apply(x, difference, (*factors, weight, bias, on_input))  # type: ignore[no-untyped-call]
    return result


class _LowRankUpdate(torch.autograd.Function):
    """residual + (x downᵀ) upᵀ with trained factors, saving x, as LoRA does, and x downᵀ (tokens × r) for backward.

    If x or residual is tensor-parallel, down or up holds this process's columns or rows, as in `_SubspaceUpdate`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, residual: Tensor, of_x: Share | None, of_residual: Share | None
    ) -> Tensor:
        coordinates = torch.mm(x.reshape(-1, x.shape[-1]), down.t())
        if of_x is not None:
            coordinates = of_x.total(coordinates)
        ctx.save_for_backward(x, coordinates, down, up)
        ctx.of_residual = of_residual
        result = residual.clone(memory_format=torch.contiguous_format)
        result.view(len(coordinates), result.shape[-1]).addmm_(coordinates, up.t())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, coordinates, down, up = ctx.saved_tensors
        needs, of_residual = ctx.needs_input_grad, ctx.of_residual
        read, grad_down, grad_up = _low_rank_backward(needs, gradient, x, coordinates, down, up, of_residual)
        grad_x = torch.mm(read, down).view(x.shape) if needs[0] else None
        return grad_x, grad_down, grad_up, gradient if needs[3] else None, None, None


def _low_rank_backward(
    needs: Sequence[bool],
    gradient: Tensor,
    x: Tensor,
    coordinates: Tensor,
    down: Tensor,
    up: Tensor,
    of_residual: Share | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of x downᵀ, (tokens, r), and those of down and up if they are needed."""
    flat = gradient.reshape(-1, gradient.shape[-1])
    read = torch.mm(flat, up)
    if of_residual is not None:
        read = of_residual.total(read)
    grad_down = torch.mm(read.t(), x.reshape(-1, x.shape[-1])) if needs[1] else None
    return read, grad_down, torch.mm(flat.t(), coordinates) if needs[2] else None


def low_rank_update(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    residual: Tensor,
    of_x: Share | None = None,
    of_residual: Share | None = None,
) -> Tensor:
    """Add an update with trained factors to the output of any layer.

    Args:
        x: (..., in), or with `of_x` this process's share of its columns.
        down, up: (r, in) and (out, r), times the scale, in the dtype of `residual` and cut to the shares.
        residual: (..., out), the layer's own output, or with `of_residual` this process's share of its columns.
        of_x, of_residual: this process's shares under tensor parallelism; None for whole tensors.

    Returns:
        residual + (x downᵀ) upᵀ, differentiable once.
    """
    if is_exported():
        return residual + x @ down.t() @ up.t()
    result: Tensor = _LowRankUpdate.apply(x, down, up, residual, of_x, of_residual)  # type: ignore[no-untyped-call]
    return result


class _LinearLowRankUpdate(torch.autograd.Function):
    """x Wᵀ + b and its update with trained factors in one node, for a frozen plain linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, linear: tuple[Tensor, Tensor | None]) -> Tensor:
        weight, bias = linear
        flat = x.reshape(-1, x.shape[-1])
        coordinates = torch.mm(flat, down.t())
        ctx.save_for_backward(x, coordinates, down, up)
        ctx.weight = weight
        result, rows = frozen_linear(flat, x.shape, weight, bias)
        rows.addmm_(coordinates, up.t())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, coordinates, down, up = ctx.saved_tensors
        read, grad_down, grad_up = _low_rank_backward(ctx.needs_input_grad, gradient, x, coordinates, down, up)
        if not ctx.needs_input_grad[0]:
            return None, grad_down, grad_up, None
        grad_x = torch.mm(gradient.reshape(-1, gradient.shape[-1]), ctx.weight).addmm_(read, down)
        return grad_x.view(x.shape), grad_down, grad_up, None


def linear_with_low_rank(x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with an update of trained factors, for frozen W and b of the same dtype as x.

    Args:
        x: (..., in).
        down, up: (r, in) and (out, r), times the scale, in the dtype of x.
        weight: W, (out, in).
        bias: (out,), or None.

    Returns:
        (..., out), differentiable once.
    """
    result: Tensor = _LinearLowRankUpdate.apply(x, down, up, (weight, bias))  # type: ignore[no-untyped-call]
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


def decoding_kernels(x: Tensor, weight: Tensor, bias: Tensor | None, factors: tuple[Tensor, Tensor]) -> Any:
    """The kernels that multiply one token x (..., in) by W and its update in two launches, if available; else None."""
    kernels = None if torch.is_grad_enabled() else kernels_for(x, "decoding_kernels")
    if kernels is None or x.numel() != x.shape[-1]:
        return None
    return kernels if kernels.can_multiply(x.reshape(1, -1), weight, bias, *factors) else None


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
