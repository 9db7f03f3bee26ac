"""Linear maps of row vectors as chains of structured factors I + D, applied without forming the whole matrix.

A factor defines how a few tensors act on x (tokens, n). A chain applies its factors one after the other and saves only
its input for backward: recomputing intermediate results is cheaper than storing tokens × n for each factor. D is stored
instead of I + D, so that a small rotation keeps its relative precision and D = 0 changes no bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from isotune.algebra.acceleration import kernels_for
from isotune.algebra.recording import is_plain


def refuse_double_backward() -> None:
    """Raise a RuntimeError if a backward pass is itself being recorded.

    What a node saves in its forward is not connected to the graph, so a second derivative would be silently wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "An adapted layer can only be differentiated once; create_graph=True is not supported. Compute second "
            "derivatives by torch.func (hessian, jvp), or on the merged model, or by finite differences of gradients."
        )


class Factor(ABC):
    """x ↦ x (I + D) on row vectors of one width, D given by `count` tensors."""

    count: ClassVar[int]

    @property
    def parts(self) -> Chain:
        """The factors it consists of, each of which can be transposed on its own."""
        return (self,)

    @abstractmethod
    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        """x (I + D) for x (tokens, n): a new tensor, or with `in_place` x itself if it is contiguous."""

    @abstractmethod
    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors, differentiably, with which the same factor computes x ↦ x (I + D)ᵀ."""

    @abstractmethod
    def backward(
        self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor], needs_x: bool, in_place: bool = False
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The gradients of x, if needed, and of the tensors from that of x (I + D); `in_place` may overwrite it."""


class BlockDiagonal(Factor):
    """D is block-diagonal on all or some columns, in their order or permuted; its tensor is (blocks, b, b).

    Args:
        size: b.
        columns: slice of the columns that the blocks cover; None for all.
        order: (n,), a permutation, position -> column; None keeps the order. Excludes `columns`.
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
        """The columns as (blocks, tokens, b), a view if they are in order."""
        if self.permuted:
            x = x.index_select(1, self._order(x.device)[0])
        elif self.columns is not None:
            x = x[:, self.columns]
            x = x if x.stride(1) == 1 else x.contiguous()  # or each product would copy strided columns
        return x.reshape(x.shape[0], x.shape[1] // self.size, self.size).transpose(0, 1)

    def kernels(self, blocks: Tensor, *rows: Tensor) -> Any:
        """The kernels for these tensors, or None if there are none."""
        if self.permuted or self.columns is not None:
            return None
        kernels = kernels_for(blocks, "block_kernels")
        return kernels if kernels is not None and kernels.can_rotate(blocks, *rows) else None

    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        if kernels := self.kernels(tensors[0], x):
            rotated: Tensor | None = kernels.rotate_blocks(x, tensors[0], in_place)
            if rotated is not None:
                return rotated
        return self._add(x, torch.bmm(self._blocks(x), tensors[0]), in_place)

    def _add(self, x: Tensor, blocks: Tensor, in_place: bool) -> Tensor:
        """Add (blocks, tokens, b) to x on the columns that they cover."""
        update = blocks.transpose(0, 1)
        if self.permuted:
            update = update.flatten(1).index_select(1, self._order(x.device)[1])
            return x.add_(update) if in_place else x + update
        if self.columns is None:
            own = x.reshape(update.shape)
            return (own.add_(update) if in_place else own + update).reshape(x.shape)
        result = x if in_place else x.clone()
        result[:, self.columns].add_(update.flatten(1))
        return result

    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (tensors[0].mT,)

    def backward(
        self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor], needs_x: bool, in_place: bool = False
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        if (needs_x or self.size < 16) and (kernels := self.kernels(tensors[0], x, gradient)):
            found = kernels.rotate_blocks_backward(x, gradient, tensors[0], needs_x, in_place)
            if found is not None:
                return found[0], (found[1],)
        own = self._blocks(gradient)
        grads = (torch.bmm(self._blocks(x).mT, own),)
        return self._add(gradient, torch.bmm(own, tensors[0].mT), in_place) if needs_x else None, grads


class Nested(Factor):
    """A dense D on the first coordinates of all blocks, (1, n / b, n / b), followed by the blocks, (n / b, b, b).

    Equivalent to two `BlockDiagonal` factors, which are used if there are no kernels; the kernels add the first
    factor's result to x as they read it.

    Args:
        size: b.
        blocks: n / b.
    """

    count = 2

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        self.coarse = BlockDiagonal(blocks, slice(0, size * blocks, size))
        self.fine = BlockDiagonal(size)

    @property
    def parts(self) -> Chain:
        return self.coarse, self.fine

    def _firsts(self, x: Tensor) -> Tensor:
        return x[:, :: self.size].contiguous()

    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        dense, blocks = tensors
        if kernels := self.fine.kernels(blocks, x):
            rotated: Tensor | None = kernels.rotate_blocks(x, blocks, in_place, torch.mm(self._firsts(x), dense[0]))
            if rotated is not None:
                return rotated
        return chain_forward(x, self.parts, tensors, in_place)

    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        raise NotImplementedError("The transposed map acts in the other order; transpose the parts.")

    def backward(
        self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor], needs_x: bool, in_place: bool = False
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        dense, blocks = tensors
        if kernels := self.fine.kernels(blocks, x, gradient):
            firsts = self._firsts(x)
            found = kernels.rotate_blocks_backward(x, gradient, blocks, True, in_place, torch.mm(firsts, dense[0]))
            if found is not None:
                grad_x, grad_blocks, grad_firsts = found
                if needs_x:
                    grad_x[:, :: self.size].add_(torch.mm(grad_firsts, dense[0].t()))
                grads = torch.mm(firsts.t(), grad_firsts).unsqueeze(0), grad_blocks
                return grad_x if needs_x else None, grads
        return chain_backward(x, gradient, self.parts, tensors, needs_x, in_place)


class LowRank(Factor):
    """D = left · right, from two tensors (n, r) and (r, n)."""

    count = 2

    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        left, right = tensors
        inner = torch.mm(x, left)
        return x.addmm_(inner, right) if in_place else torch.addmm(x, inner, right)

    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        left, right = tensors
        return right.mT, left.mT

    def backward(
        self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor], needs_x: bool, in_place: bool = False
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        left, right = tensors
        inner = torch.mm(gradient, right.t())
        grads = torch.mm(x.t(), inner), torch.mm(torch.mm(x, left).t(), gradient)
        if not needs_x:
            return None, grads
        return gradient.addmm_(inner, left.t()) if in_place else torch.addmm(gradient, inner, left.t()), grads


class Pairs(Factor):
    """D joins column i of the first half of each group with the one of the second half at the same place.

    From two tensors (n,), the diagonal d and the other entries e: (x D)ₖ = xₖ dₖ + x_p(k) eₖ with the partner p(k). It
    is computed element by element, as RoAd and RoPE are, since blocks of 2 × 2 would be many small products.

    Args:
        group: number of columns of a group, even.
    """

    count = 2

    def __init__(self, group: int) -> None:
        self.group = group

    def partners(self, x: Tensor) -> Tensor:
        """x (..., n) with each column in the place of its partner; a copy."""
        return self.halves(x).flip(-2).flatten(-3)

    def halves(self, x: Tensor) -> Tensor:
        """x (..., n) as (..., n / group, 2, group / 2)."""
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.group, 2, self.group // 2)

    def apply(self, x: Tensor, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
        diagonal, other = tensors
        partners = self.partners(x)
        result = x.addcmul_(x, diagonal) if in_place else torch.addcmul(x, x, diagonal)
        return result.addcmul_(partners, other)

    def transposed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        diagonal, other = tensors
        return diagonal, self.partners(other)

    def backward(
        self, x: Tensor, gradient: Tensor, tensors: Sequence[Tensor], needs_x: bool, in_place: bool = False
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        grads = (x * gradient).sum(0), (self.partners(x) * gradient).sum(0)
        return self.apply(gradient, self.transposed(tensors), in_place) if needs_x else None, grads


Chain = tuple[Factor, ...]


def split_tensors(chain: Chain, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Split the tensors of a chain into those of each factor."""
    parts, start = [], 0
    for factor in chain:
        parts.append(tensors[start : start + factor.count])
        start += factor.count
    return parts


def chain_forward(x: Tensor, chain: Chain, tensors: Sequence[Tensor], in_place: bool = False) -> Tensor:
    """x (I + D₁) (I + D₂) … for x (tokens, n), without a graph; `in_place` may overwrite it."""
    for factor, own in zip(chain, split_tensors(chain, tensors), strict=True):
        x = factor.apply(x, own, in_place)
        in_place = not is_plain()  # a factor's result belongs to this chain alone
    return x


def chain_backward(
    x: Tensor, gradient: Tensor, chain: Chain, tensors: Sequence[Tensor], needs_x: bool, in_place: bool = False
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The gradients of x, if needed, and of all tensors in order; x (tokens, n) is the input of the chain.

    With `in_place`, the gradient (contiguous) may be overwritten.
    """
    parts = split_tensors(chain, tensors)
    inputs = [x]
    for factor, own in zip(chain[:-1], parts, strict=False):
        inputs.append(factor.apply(inputs[-1], own))
    grads: list[Tensor] = []
    for place in reversed(range(len(chain))):
        factor, own = chain[place], parts[place]
        before, own_grads = factor.backward(inputs.pop(), gradient, own, needs_x or place > 0, in_place)
        grads = [*own_grads, *grads]
        if before is not None:
            gradient, in_place = before, True
    return gradient if needs_x else None, tuple(grads)


class _Chain(torch.autograd.Function):
    """A chain that saves its input and its tensors for backward."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        # Unnamed arguments: a trace takes a forward called with as many arguments as it names for one without ctx.
        x, chain, *tensors = given
        ctx.save_for_backward(x, *tensors)
        ctx.chain = chain
        # Detached: if this were a view, later operations such as ReLU(inplace=True) could not change it in place.
        return chain_forward(x.reshape(-1, x.shape[-1]), chain, tensors).reshape(x.shape).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, *tensors = ctx.saved_tensors
        width = x.shape[-1]
        grad_x, grads = chain_backward(
            x.reshape(-1, width), gradient.reshape(-1, width), ctx.chain, tensors, ctx.needs_input_grad[0]
        )
        return None if grad_x is None else grad_x.reshape(x.shape), None, *grads


def apply_chain(x: Tensor, chain: Chain, tensors: Sequence[Tensor]) -> Tensor:
    """x (I + D₁) (I + D₂) … over the last dimension of x.

    Args:
        x: (..., n).
        chain: one or more factors, in the order in which they act.
        tensors: the tensors of all factors in order, in the dtype of x.

    Returns:
        The shape of x; differentiable once. For backward, x itself is saved, so layers with the same input share it.
    """
    if is_plain():
        return chain_forward(x.reshape(-1, x.shape[-1]), chain, tensors).reshape(x.shape)
    result: Tensor = _Chain.apply(x, chain, *tensors)  # type: ignore[no-untyped-call]
    return result


def transpose_chain(chain: Chain, tensors: Sequence[Tensor]) -> tuple[Chain, tuple[Tensor, ...]]:
    """The chain of the transposed map, differentiably: ((I + D₁)(I + D₂))ᵀ = (I + D₂ᵀ)(I + D₁ᵀ)."""
    parts = tuple(part for factor in chain for part in factor.parts)
    pairs = list(zip(parts, split_tensors(parts, tensors), strict=True))[::-1]
    return tuple(factor for factor, _ in pairs), tuple(t for factor, own in pairs for t in factor.transposed(own))
