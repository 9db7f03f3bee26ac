"""Butterfly products of block-diagonal matrices, folded into block-diagonal matrices with larger blocks.

Stage i of a butterfly with blocks of size b sees the coordinates as chunks of b/2 and joins chunks 2^(i−1) apart; the
stage with the largest stride acts first. The lowest stages together never leave b · 2^(stages − 1) adjacent
coordinates: their product is block-diagonal again, and one product with larger blocks is faster than several with
small ones. Higher stages are the same on permuted coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.algebra.factors import BlockDiagonal, Chain

MAX_BLOCK = 64
"""Largest folded block: beyond it the extra multiplications outweigh what the larger products gain."""


def _groups(size: int, stages: int) -> list[range]:
    """Which stages, counted from 0, are folded together."""
    fits = 1
    while fits < stages and size * 2**fits <= MAX_BLOCK:
        fits += 1
    return [range(start, min(start + fits, stages)) for start in range(0, stages, fits)]


def butterfly_chain(n: int, size: int, stages: int) -> Chain:
    """The factors of the butterfly on n coordinates, the one that acts first in front.

    Args:
        n: a multiple of size · 2^(stages − 1).
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
        stages: (..., m, n / b, b, b), D = R − I of each block: the stage of adjacent coordinates, which acts last, in
            front; within a stage in the order of the first coordinate of each block.
        size: b.

    Returns:
        One (..., blocks, B, B) for each factor of the chain.

    Source: Liu et al., BOFT (ICLR 2024), section 4.
    """
    groups = reversed(_groups(size, stages.shape[-4]))
    return tuple(_fold([stages[..., stage, :, :, :] for stage in group], size, group.start) for group in groups)


def _fold(stages: list[Tensor], size: int, before: int) -> Tensor:
    """M − I of consecutive stages as blocks of size · 2^(len − 1), in the order of `butterfly_chain`."""
    leading, count, half = stages[0].shape[:-3], stages[0].shape[-3], size // 2
    if len(stages) == 1:
        return stages[0]
    width = len(stages)
    inner, chunks = 2**before, 2**width
    outer = count * 2 // (chunks * inner)
    block = chunks * half
    # A stage's blocks in the order of their first coordinate: (outer, high, between, inner) for stage j of the group,
    # where high counts the chunks above the joined bit within the group, and between those below it.
    total = stages[0].new_zeros(*leading, outer * inner, block, block)
    for j, stage in reversed(list(enumerate(stages))):
        high, between = 2 ** (width - 1 - j), 2**j
        own = stage.reshape(*leading, outer, high, between, inner, size, size)
        own = own.movedim(-3, -5)  # (outer, inner, high, between, b, b)
        own = own.reshape(*leading, outer * inner, high * between, size, size)
        # (I + C)(I + E) − I = C + (I + C) E: E mixes columns of I + C, chunk pairs of the joined bit.
        whole = total + torch.eye(block, dtype=total.dtype, device=total.device)
        columns = whole.reshape(*leading, outer * inner, block, high, 2, between, half)
        dims = columns.dim()
        columns = columns.permute(*range(dims - 5), dims - 4, dims - 2, dims - 5, dims - 3, dims - 1)
        mixed = columns.reshape(*leading, outer * inner, high * between, block, size) @ own
        mixed = mixed.reshape(*leading, outer * inner, high, between, block, 2, half)
        mixed = mixed.permute(*range(dims - 5), dims - 3, dims - 5, dims - 2, dims - 4, dims - 1)
        total = total + mixed.reshape(*leading, outer * inner, block, block)
    return total
