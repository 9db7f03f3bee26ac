"""Linear maps of row vectors as chains of structured factors I + D, applied without ever forming the whole matrix.

A factor says how a few tensors act on x (tokens, n); a chain applies one after the other, keeps nothing but x itself
for backward, and undoes nothing: what lies between two factors is computed again from x, which costs less than keeping
it. D and not I + D is stored, so that a small rotation keeps its relative precision and D = 0 changes no bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
"""In these small differences of numbers survive; in half precision they are rounded away."""


def refuse_double_backward() -> None:
    """Raise a RuntimeError where a backward pass is itself being recorded.

    What a node keeps of its forward is not connected to the graph, so a second derivative would be silently wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "An adapted layer can be differentiated once; create_graph=True through it is not supported. "
            "Compute second derivatives on the merged model, or by finite differences of gradients."
        )


class Factor(ABC):
    """x ↦ x (I + D) on row vectors of one width, D given by `count` tensors."""

    count: ClassVar[int]

    @abstractmethod
    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        """x (I + D) for x (tokens, n): a new tensor, or with `in_place` x itself if it is contiguous."""

    @abstractmethod
    def gradients(self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the tensors from that of x (I + D)."""

    @abstractmethod
    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors, differentiably, with which the same factor is x ↦ x (I + D)ᵀ."""


class BlockDiagonal(Factor):
    """D is block-diagonal on all or some of the columns, in their order or permuted.

    Its one tensor is (blocks, b, b).

    Args:
        size: b.
        columns: slice of the columns that the blocks cover; None for all of them.
        order: (n,), a permutation: position -> column; None for the columns as they are. Excludes `columns`.
    """

    count = 1

    def __init__(self, size: int, columns: slice | None = None, order: Tensor | None = None) -> None:
        self.size = size
        self.columns = columns
        self.permuted = order is not None
        self._orders = {} if order is None else {order.device: (order, torch.argsort(order))}

    def _order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The permutation and its inverse on a device."""
        if device not in self._orders:
            order, inverse = next(iter(self._orders.values()))
            self._orders[device] = order.to(device), inverse.to(device)
        return self._orders[device]

    def _blocks(self, x: Tensor) -> Tensor:
        """The columns as (blocks, tokens, b), a view where they lie in order."""
        if self.permuted:
            x = x.index_select(1, self._order(x.device)[0])
        elif self.columns is not None:
            x = x[:, self.columns]
        return x.reshape(x.shape[0], x.shape[1] // self.size, self.size).transpose(0, 1)

    def _add(self, x: Tensor, update: Tensor, in_place: bool) -> Tensor:
        """x plus what (blocks, tokens, b) holds for its columns."""
        update = update.transpose(0, 1)
        if self.permuted:
            update = update.flatten(1).index_select(1, self._order(x.device)[1])
            return x.add_(update) if in_place else x + update
        if self.columns is None:
            blocks = x.reshape(update.shape)
            return (blocks.add_(update) if in_place else blocks + update).reshape(x.shape)
        result = x if in_place else x.clone()
        result[:, self.columns] += update.flatten(1)
        return result

    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        """x + x D."""
        return self._add(x, torch.bmm(self._blocks(x), tensors[0]), in_place)

    def gradients(self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """∂D = xᵀ g block by block."""
        return (torch.bmm(self._blocks(x).mT, self._blocks(gradient)),)

    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each block transposed."""
        return (tensors[0].mT,)


class LowRank(Factor):
    """D = left · right, from two tensors (n, r) and (r, n)."""

    count = 2

    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        """x + (x left) right."""
        left, right = tensors
        inner = torch.mm(x, left)
        return x.addmm_(inner, right) if in_place else torch.addmm(x, inner, right)

    def gradients(self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """∂left = xᵀ (g rightᵀ), ∂right = (x left)ᵀ g."""
        left, right = tensors
        return torch.mm(x.t(), torch.mm(gradient, right.t())), torch.mm(torch.mm(x, left).t(), gradient)

    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Dᵀ = rightᵀ leftᵀ."""
        left, right = tensors
        return right.mT, left.mT


Chain = tuple[Factor, ...]


def split_tensors(chain: Chain, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The tensors of each factor, from those of all in order."""
    parts, start = [], 0
    for factor in chain:
        parts.append(tensors[start : start + factor.count])
        start += factor.count
    return parts


def chain_forward(x: Tensor, chain: Chain, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
    """x (I + D₁) (I + D₂) … for x (tokens, n), without a graph; with `in_place` x, contiguous, may be overwritten."""
    for factor, own in zip(chain, split_tensors(chain, tensors), strict=True):
        x = factor.apply(x, own, in_place)
        in_place = True  # what a factor has made is nobody else's
    return x


def chain_backward(
    x: Tensor, gradient: Tensor, chain: Chain, tensors: Sequence[Tensor], needs_x: bool, in_place: bool = False
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The gradients of x, if needed, and of all tensors in order; x (tokens, n) is the input of the chain.

    With `in_place` the gradient, contiguous, may be overwritten.
    """
    parts = split_tensors(chain, tensors)
    inputs = [x]
    for factor, own in zip(chain[:-1], parts, strict=False):
        inputs.append(factor.apply(inputs[-1], own))
    grads: list[Tensor] = []
    for place in reversed(range(len(chain))):
        factor, own = chain[place], parts[place]
        grads = [*factor.gradients(inputs.pop(), gradient, own), *grads]
        if needs_x or place > 0:
            gradient = factor.apply(gradient, factor.transposed(own), in_place)
            in_place = True
    return gradient if needs_x else None, tuple(grads)


def _keep(ctx: Any, others: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> None:
    """Save for backward, but of the tensors of factors those not that what made them can make again then."""
    sources = [None if torch.compiler.is_compiling() else _source(tensor) for tensor in tensors]
    ctx.sources = sources
    ctx.save_for_backward(*others, *(t for t, source in zip(tensors, sources, strict=True) if source is None))


def _source(tensor: Tensor) -> Callable[[], Tensor] | None:
    """What makes the tensor again, where the node that it came from says how."""
    makes_again = getattr(tensor.grad_fn, "makes_again", None)
    return None if makes_again is None else partial(makes_again, tensor.output_nr)


def _kept(ctx: Any, others: int) -> tuple[Sequence[Tensor], list[Tensor]]:
    """What `_keep` was given: the first `others`, and the tensors of factors."""
    saved = ctx.saved_tensors
    rest = iter(saved[others:])
    return saved[:others], [next(rest) if source is None else source() for source in ctx.sources]


class _Chain(torch.autograd.Function):
    """A chain that keeps its input and its tensors."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        # Not named: a trace takes a function that is given as many arguments as its signature has for one without ctx.
        x, chain, *tensors = given
        _keep(ctx, (x,), tensors)
        ctx.chain = chain
        return chain_forward(x.reshape(-1, x.shape[-1]), chain, tensors).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (x,), tensors = _kept(ctx, 1)
        width = x.shape[-1]
        grad_x, grads = chain_backward(
            x.reshape(-1, width), gradient.reshape(-1, width), ctx.chain, tensors, ctx.needs_input_grad[0]
        )
        return None if grad_x is None else grad_x.reshape(x.shape), None, *grads


def apply_chain(x: Tensor, chain: Chain, tensors: Sequence[Tensor]) -> Tensor:
    """x (I + D₁) (I + D₂) … over the last dimension of x.

    Args:
        x: (..., n).
        chain: the factors, the one that acts first in front; at least one.
        tensors: of all factors in order, in the dtype of x.

    Returns:
        The shape of x; differentiable once. For backward x itself is kept, so layers that read the same x share it.
    """
    result: Tensor = _Chain.apply(x, chain, *tensors)  # type: ignore[no-untyped-call]
    return result


def transpose_chain(chain: Chain, tensors: Sequence[Tensor]) -> tuple[Chain, tuple[Tensor, ...]]:
    """The chain of the transposed map, differentiably: ((I + D₁)(I + D₂))ᵀ = (I + D₂ᵀ)(I + D₁ᵀ)."""
    pairs = list(zip(chain, split_tensors(chain, tensors), strict=True))[::-1]
    return tuple(factor for factor, _ in pairs), tuple(t for factor, own in pairs for t in factor.transposed(own))


def frozen_linear(flat: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """flat Wᵀ + b without a graph, for use in the forward of a node.

    Args:
        flat: (tokens, in).
        shape: (..., in), what `flat` was before its leading dimensions became one.
        weight: W, (out, in), in the dtype of `flat`.
        bias: (out,), or None.

    Returns:
        The result, (..., out), and a view of it as (tokens, out). It is allocated in its final shape and filled
        through that view: a result that was a view itself could not be changed in place by what follows, such as
        ReLU(inplace=True).
    """
    result = flat.new_empty(*shape[:-1], weight.shape[0])
    rows = result.view(len(flat), weight.shape[0])
    if bias is None:
        torch.mm(flat, weight.t(), out=rows)
    else:
        torch.addmm(bias, flat, weight.t(), out=rows)
    return result, rows


class _RotatedLinear(torch.autograd.Function):
    """diag(gain) applied to chain(x) Wᵀ, plus bias, for a frozen W and bias; keeps x alone.

    The gradient of a gain needs chain(x) Wᵀ once more. Keeping it would cost tokens × out; computing it again costs one
    product. Often the layer's output is kept by whatever comes after it, and then it is read off that
    (`keep_if_alive`).
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, gain, chain, (weight, bias), *tensors = given  # as in `_Chain.forward`
        _keep(ctx, (x, gain), tensors)
        ctx.chain, ctx.weight, ctx.bias, ctx.output = chain, weight, bias, None
        rotated = chain_forward(x.reshape(-1, x.shape[-1]), chain, tensors)
        bias = None if bias is None else bias.to(x.dtype)
        result, rows = frozen_linear(rotated, x.shape, weight.to(x.dtype), bias)
        if gain is not None:
            # What the gain adds to what the layer itself computes, so that a gain of one changes no bit.
            rows.addcmul_(rows if bias is None else rows - bias, (gain - 1).to(x.dtype))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (x, gain), tensors = _kept(ctx, 2)
        flat, grad = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        weight, grad_gain = ctx.weight.to(x.dtype), None
        scratch: Tensor | None = None
        if ctx.needs_input_grad[1]:
            output = _take_output(ctx)
            if output is None:
                scratch = torch.mm(chain_forward(flat, ctx.chain, tensors), weight.t())
                grad_gain = scratch.mul_(grad).sum(0, dtype=gain.dtype)
            else:
                scratch = torch.mul(output.reshape(grad.shape), grad)
                grad_gain = scratch.sum(0, dtype=gain.dtype)
                if ctx.bias is not None:
                    grad_gain -= ctx.bias.to(gain.dtype) * grad.sum(0, dtype=gain.dtype)
                # What the forward pass multiplied by, in its precision.
                grad_gain /= 1 + (gain - 1).to(x.dtype).to(gain.dtype)
        inner = torch.mm(grad if gain is None else torch.mul(grad, gain.to(x.dtype), out=scratch), weight)
        grad_x, grads = chain_backward(flat, inner, ctx.chain, tensors, ctx.needs_input_grad[0], in_place=True)
        return None if grad_x is None else grad_x.reshape(x.shape), grad_gain, None, None, *grads


_SMALLEST_GAIN = 0.125
"""Below it the output has lost so many of its digits to the division by its gain that it is computed again."""


def keep_if_alive(output: Tensor | None, version: int, gain: Tensor) -> None:
    """Let the backward of `rotated_linear` use its output, which something else has kept, to find a gain's gradient.

    Done when the forward pass is over: what lives then is kept for backward anyway, by an activation function or a
    product; but that lets go of it just before it would be used here.

    Args:
        output: of `rotated_linear`, or None where it is gone.
        version: of it, when it was new; one that has been written to since is of no use.
        gain: that it was multiplied by.
    """
    if output is None or output._version != version or output.device.type != "cpu":
        return  # a GPU would have to be waited for, to see the gain
    precise = output.grad_fn.bias is None or output.dtype in WIDE  # type: ignore[union-attr]
    if precise and bool((gain.detach().abs() >= _SMALLEST_GAIN).all()):
        output.grad_fn.output = output.detach(), version  # type: ignore[union-attr]


def _take_output(ctx: Any) -> Tensor | None:
    """The output that `keep_if_alive` found, unless it has been written to since.

    Like what is saved for backward it goes with the first backward pass that does not retain the graph: a loss that is
    held into the next step must not hold it, and a second pass must find what the first did, to the last bit.
    """
    output, version = ctx.output or (None, 0)
    if not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.output = None
    return output if output is not None and output._version == version else None


def rotated_linear(
    x: Tensor, gain: Tensor | None, chain: Chain, tensors: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """gain ⊙ (chain(x) Wᵀ) + bias for a frozen layer.

    Args:
        x: (..., in).
        gain: (out,), in float32 at least, or None.
        chain, tensors: as in `apply_chain`, on `in` coordinates.
        weight: W, (out, in), not trained; of any dtype, it is multiplied in that of x.
        bias: (out,), not trained, or None.

    Returns:
        (..., out); differentiable once. For backward x itself is kept, and nothing else of that size.
    """
    result: Tensor = _RotatedLinear.apply(x, gain, chain, (weight, bias), *tensors)  # type: ignore[no-untyped-call]
    return result
