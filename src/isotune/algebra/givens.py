"""Trees of Givens rotations: n − 1 pairs that reach every coordinate, folded into a few small dense blocks.

Level l rotates the pairs (i, i + s) with s = 2^(l−1), i = 0, 2s, 4s, …, as far as i + s < n. The lowest levels never
leave a block of adjacent coordinates, and the levels above touch only the first coordinate of each such block; so the
tree is a product of block-diagonal matrices, one for every `LEVELS` levels, each on a `2^LEVELS` times coarser grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from isotune.algebra.factors import BlockDiagonal, Chain

LEVELS = 5
"""Levels folded into one block: 32 × 32 blocks are where a matrix product begins to pay."""

_LEAF = 2**LEVELS


def _widths(n: int) -> list[int]:
    """The number of coordinates on each grid, from the finest, as long as there is a pair."""
    widths = [n]
    while (coarser := -(-widths[-1] // _LEAF)) > 1:
        widths.append(coarser)
    return widths


def givens_chain(n: int) -> Chain:
    """The factors of the tree on n coordinates, the one that acts first in front.

    Each grid has one factor for its whole blocks, if any, and one for the incomplete block at its end, if any.
    """
    chain: list[BlockDiagonal] = []
    step = 1
    for width in _widths(n):
        whole, rest = divmod(width, _LEAF)
        own = []
        if whole:
            covers_all = step == 1 and rest == 0
            own.append(BlockDiagonal(_LEAF, None if covers_all else slice(0, whole * _LEAF * step, step)))
        if rest > 1:
            own.append(BlockDiagonal(rest, slice(whole * _LEAF * step, n, step)))
        chain = own + chain
        step *= _LEAF
    return tuple(chain)


def rotation_pairs(angles: Tensor) -> Tensor:
    """G − I of the rotations x_i ↦ c x_i + s x_j, x_j ↦ −s x_i + c x_j, on row vectors, by angles (...) in radians.

    Returns:
        (..., 2, 2), [[c − 1, −s], [s, c − 1]]; c − 1 is computed without cancellation.
    """
    sine, less = torch.sin(angles), -2 * torch.sin(0.5 * angles).square()
    return torch.stack([torch.stack([less, -sine], -1), torch.stack([sine, less], -1)], -2)


def givens_blocks(pairs: Tensor, n: int) -> tuple[Tensor, ...]:
    """The blocks of `givens_chain(n)` from the 2 × 2 matrices of all pairs.

    Args:
        pairs: (..., n − 1, 2, 2), G − I of each pair on row vectors: level by level, within a level by i.
        n: number of coordinates.

    Returns:
        One (..., blocks, b, b) for each factor of the chain, D = M − I.

    Source: Ma et al., GOFT (ICML 2024), equation 3.
    """
    found: list[Tensor] = []
    start = 0
    for width in _widths(n):
        count = -(-width // _LEAF)
        blocks = pairs.new_zeros(*pairs.shape[:-3], count * _LEAF, 1, 1)
        for level in range(1, LEVELS + 1):
            slots, real = count * _LEAF // 2**level, len(range(2 ** (level - 1), width, 2**level))
            turn = pairs[..., start : start + real, :, :]
            start += real
            if slots > real:
                turn = pad(turn, (0, 0, 0, 0, 0, slots - real))
            blocks = _double(blocks, turn)
        whole, rest = divmod(width, _LEAF)
        own = []
        if whole:
            own.append(blocks[..., :whole, :, :])
        if rest > 1:
            # Copied out of the filled-up block, which would otherwise be kept for backward.
            own.append(blocks[..., whole:, :rest, :rest].contiguous())
        found = own + found
    return tuple(found)


def _double(blocks: Tensor, turn: Tensor) -> Tensor:
    """Join neighbouring blocks (..., 2k, b, b) by the pairs (..., k, 2, 2) of their first coordinates.

    The pair acts first, and then the blocks: rows 0 and b of the product are mixtures of the blocks' first rows.
    """
    left, right = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
    size = blocks.shape[-1]
    first, second = left[..., 0, :], right[..., 0, :]
    unit = torch.zeros(size, dtype=blocks.dtype, device=blocks.device)
    unit[0] = 1
    whole_first, whole_second = first + unit, second + unit
    # M − I of row 0: (1 + g₀₀)(first + e) − e on the left, g₀₁ (second + e) on the right; row b likewise.
    top = torch.cat([first + turn[..., 0, 0, None] * whole_first, turn[..., 0, 1, None] * whole_second], -1)
    bottom = torch.cat([turn[..., 1, 0, None] * whole_first, second + turn[..., 1, 1, None] * whole_second], -1)
    upper, lower = pad(left[..., 1:, :], (0, size)), pad(right[..., 1:, :], (size, 0))
    return torch.cat([top[..., None, :], upper, bottom[..., None, :], lower], -2)


def pair_penalty(pairs: Tensor) -> Tensor:
    """Σ (a₁b₁ + a₂b₂)² over matrices [[a₁, b₁], [a₂, b₂]], (..., 2, 2): how far their columns are from orthogonal.

    Source: Ma et al., GOFT (ICML 2024), the regulariser of qGOFT.
    """
    return (pairs[..., 0] * pairs[..., 1]).sum(-1).square().sum()
