"""Butterfly products of block-diagonal matrices, folded into block-diagonal matrices with larger blocks.

Stage i of a butterfly with blocks of size b divides the coordinates into chunks of b/2 and joins chunks 2^(i−1) apart;
the stage with the largest stride acts first. The lowest stages together stay within b · 2^(stages − 1) adjacent
coordinates, so their product is block-diagonal again, and one product with larger blocks is faster than several with
small ones. Higher stages are the same on permuted coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isotune.algebra.constants import made_once
from isotune.algebra.factors import BlockDiagonal, Chain, refuse_double_backward
from isotune.algebra.recording import is_plain

MAX_BLOCK = 64
"""Largest folded block; beyond it the extra multiplications outweigh the gain of larger products."""


def _groups(size: int, stages: int) -> list[range]:
    """Which stages, counted from 0, are folded together."""
    fits = 1
    while fits < stages and size * 2**fits <= MAX_BLOCK:
        fits += 1
    return [range(start, min(start + fits, stages)) for start in range(0, stages, fits)]


def butterfly_chain(n: int, size: int, stages: int) -> Chain:
    """The factors of the butterfly on n coordinates, in the order in which they act.

    Args:
        n: a multiple of b · 2^(m − 1).
        size: b, even for more than one stage.
        stages: m.
    """
    chain = []
    for group in reversed(_groups(size, stages)):
        block = size * 2 ** (len(group) - 1)
        order = None
        if group.start > 0:
            inner = 2**group.start
            # (outer, chunks joined by this group, chunks between them, b/2) with the second and third swapped.
            grid = torch.arange(n).view(-1, 2 ** len(group), inner, size // 2)
            order = grid.transpose(1, 2).reshape(-1)
        chain.append(BlockDiagonal(block, order=order))
    return tuple(chain)


def butterfly_blocks(stages: Tensor, size: int) -> tuple[Tensor, ...]:
    """The blocks of `butterfly_chain` from those of all stages.

    Args:
        stages: (..., m, n / b, b, b), D = R − I of each block. The stage of adjacent coordinates, which acts last,
            comes first; within a stage, blocks are ordered by their first coordinate.
        size: b.

    Returns:
        One (..., blocks, B, B) for each factor of the chain.

    Source: Liu et al., BOFT (ICLR 2024), section 4.
    """
    each = stages.unbind(-4)
    return tuple(
        _fold(each[group.start : group.stop], size, group.start) for group in reversed(_groups(size, len(each)))
    )


def _fold(stages: Sequence[Tensor], size: int, before: int) -> Tensor:
    """M − I of consecutive stages as blocks of size · 2^(len − 1), in the order of `butterfly_chain`.

    Blocks grow from the lowest stage up, so that only the last doubling works on tensors of the final size.
    """
    leading, count = stages[0].shape[:-3], stages[0].shape[-3]
    inner = 2**before
    outer = count * 2 // (2 ** len(stages) * inner)
    total = stages[0]
    for j, stage in enumerate(stages):
        # A stage's blocks in the order of their first coordinate: (outer, high, between, inner), where between counts
        # the chunks below the joined bit within the group, and high those above it.
        high, between = 2 ** (len(stages) - 1 - j), 2**j
        own = stage.reshape(*leading, outer, high, between, inner, size, size)
        own = own.movedim(-3, -5).reshape(*leading, outer * inner * high, between, size, size)
        total = _double(total, own) if j else own.squeeze(-3)
    return total


def _double(blocks: Tensor, stage: Tensor) -> Tensor:
    """Join neighbouring blocks C, (..., 2k, S, S), by a stage E that acts before them: C + E + E C, (..., k, 2S, 2S).

    Each (2h, 2h) of E, (..., k, S / h, 2h, 2h), joins a chunk of h coordinates of one block with the same chunk of the
    next. Differentiable once.
    """
    if is_plain():
        joined, spread = _written_out(blocks, stage)
        result = torch.baddbmm(joined + spread, spread, joined)
    else:
        result = _Doubled.apply(blocks, stage)  # type: ignore[no-untyped-call]
    return result.reshape(*stage.shape[:-3], *result.shape[-2:])


def _written_out(blocks: Tensor, stage: Tensor) -> tuple[Tensor, Tensor]:
    """C and E as dense blocks of the doubled size, (all, 2S, 2S).

    One batched product of these is faster than many products of chunks, and no chunk has to be moved.
    """
    width, half = blocks.shape[-1], stage.shape[-1] // 2
    sides = _sides(blocks.dtype, blocks.device)[0][:, None, :, None]
    joined = (blocks.reshape(*stage.shape[:-3], 2, width, 1, width) * sides).reshape(-1, 2 * width, 2 * width)
    (places,) = _places(width, half, stage.device)
    spread = stage.new_zeros(len(joined), 4 * width * width).index_copy_(-1, places, stage.reshape(len(joined), -1))
    return joined, spread.reshape(joined.shape)


class _Doubled(torch.autograd.Function):
    """C + E + E C of the dense blocks, which backward recomputes from the saved arguments."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, stage: Tensor) -> Tensor:
        ctx.save_for_backward(blocks, stage)
        joined, spread = _written_out(blocks, stage)
        return torch.baddbmm(joined + spread, spread, joined)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        refuse_double_backward()
        blocks, stage = ctx.saved_tensors
        joined, spread = _written_out(blocks, stage)
        width = blocks.shape[-1]
        (places,) = _places(width, stage.shape[-1] // 2, stage.device)
        of_stage = torch.baddbmm(gradient, gradient, joined.mT).flatten(1).index_select(-1, places)
        of_joined = torch.baddbmm(gradient, spread.mT, gradient).view(-1, 2, width, 2, width)
        of_blocks = of_joined.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return of_blocks.reshape(blocks.shape), of_stage.view(stage.shape)


@made_once
def _sides(dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """The identity on two neighbouring blocks."""
    return (torch.eye(2, dtype=dtype, device=device),)


@made_once
def _places(width: int, half: int, device: torch.device) -> tuple[Tensor]:
    """Positions of the entries of a stage's (2h, 2h) matrices in a doubled block of 2 · `width` coordinates.

    Row (side, i) of a chunk's matrix is row side · S + chunk · h + i of the block.
    """
    rows = torch.arange(2 * width, device=device).view(2, -1, half).transpose(0, 1).reshape(-1, 2 * half)
    return ((rows[:, :, None] * (2 * width) + rows[:, None, :]).flatten(),)
