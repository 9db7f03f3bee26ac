"""Trees of Givens rotations: n − 1 pairs that reach every coordinate, folded into a few small dense blocks.

Level l rotates the pairs (i, i + s) with s = 2^(l−1), i = 0, 2s, 4s, …, as long as i + s < n. The lowest levels stay
within blocks of adjacent coordinates, and the levels above touch only the first coordinate of each such block; so the
tree is a product of block-diagonal matrices, one for every `LEVELS` levels, each on a `2^LEVELS` times coarser grid.
The coarsest grids together have few coordinates and become one dense matrix.

Within a block most entries are zero, and the others are products of the pairs' entries along one path through the
tree: row j > 0, whose lowest set bit is that of level l, ends there and has only the columns of its pair; the path from
the top to column i then descends the levels below, on the side of each pair where i lies.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from isotune.algebra.constants import made_once
from isotune.algebra.factors import BlockDiagonal, Chain, Nested, refuse_double_backward
from isotune.algebra.recording import is_exported, is_plain

LEVELS = 5
"""Levels folded into one block; from blocks of 32 × 32 on, a matrix product pays."""

_LEAF = 2**LEVELS
_DENSE = 1024
"""Most coordinates of a grid that is joined with the coarser ones into one matrix."""


def _widths(n: int) -> list[int]:
    """The number of coordinates on each grid, finest first, as long as there are pairs."""
    widths = [n] if n > 1 else []
    while widths and (coarser := -(-widths[-1] // _LEAF)) > 1:
        widths.append(coarser)
    return widths


def _joined(widths: list[int]) -> int:
    """The first of the grids that together become one dense matrix; the number of grids if none do."""
    return next((grid for grid, width in enumerate(widths) if grid > 0 and width <= _DENSE), len(widths))


def givens_chain(n: int) -> Chain:
    """The factors of the tree on n coordinates, in the order in which they act.

    The coarsest grids share one factor; each other grid has one for its whole blocks, if any, and one for the
    incomplete block at its end, if any. If that leaves just a dense matrix and whole blocks of the finest grid, the two
    are one factor.
    """
    chain: list[BlockDiagonal] = []
    widths = _widths(n)
    dense = _joined(widths)
    for grid, width in enumerate(widths[: dense + 1]):
        step = _LEAF**grid
        whole, rest = (0, width) if grid == dense else divmod(width, _LEAF)
        own = []
        if whole:
            covers_all = step == 1 and rest == 0
            own.append(BlockDiagonal(_LEAF, None if covers_all else slice(0, whole * _LEAF * step, step)))
        if rest > 1:
            own.append(BlockDiagonal(rest, slice(whole * _LEAF * step, n, step)))
        chain = own + chain
    if dense == 1 and n > _LEAF and n % _LEAF == 0:
        return (Nested(_LEAF, n // _LEAF),)
    return tuple(chain)


class _Pairs(torch.autograd.Function):
    """`rotation_pairs` with a backward of four operations that needs only the result; differentiable twice."""

    @staticmethod
    def forward(angles: Tensor) -> Tensor:
        return _pairs(angles)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (pairs,) = ctx.saved_tensors
        (on, minus), (plus, on_too) = (row.unbind(-1) for row in gradient.unbind(-2))
        turned = plus - minus
        less, minus_sine = pairs[..., 0, :].unbind(-1)
        return torch.addcmul(torch.addcmul(turned, turned, less), on + on_too, minus_sine)


def _pairs(angles: Tensor) -> Tensor:
    sine, less = torch.sin(angles), -2 * torch.sin(0.5 * angles).square()
    return torch.stack([less, -sine, sine, less], -1).view(*angles.shape, 2, 2)


def rotation_pairs(angles: Tensor) -> Tensor:
    """G − I of the rotations x_i ↦ c x_i + s x_j, x_j ↦ −s x_i + c x_j, on row vectors, by angles (...) in radians.

    Returns:
        (..., 2, 2), [[c − 1, −s], [s, c − 1]]; c − 1 is computed without cancellation.
    """
    result: Tensor = _pairs(angles) if is_plain() else _Pairs.apply(angles)  # type: ignore[no-untyped-call]
    return result


def givens_blocks(pairs: Tensor, n: int) -> tuple[Tensor, ...]:
    """The blocks of `givens_chain(n)` from the 2 × 2 matrices of all pairs.

    Args:
        pairs: (..., n − 1, 2, 2), G − I of each pair on row vectors: level by level, within a level by i.
        n: number of coordinates.

    Returns:
        One (..., blocks, b, b) for each factor of the chain, D = M − I; differentiable once.

    Source: Ma et al., GOFT (ICML 2024), equation 3.
    """
    widths = _widths(n)
    if not widths:
        return ()
    result: Tensor = _fold(pairs, n)[0] if is_plain() else _Blocks.apply(pairs, n)  # type: ignore[no-untyped-call]
    grids = torch.split(result, [-(-width // _LEAF) for width in widths], -3)
    dense = _joined(widths)
    found: list[Tensor] = []
    for blocks, width in zip(grids[:dense], widths, strict=False):
        whole, rest = divmod(width, _LEAF)
        own = []
        if whole:
            own.append(blocks if rest == 0 else blocks[..., :whole, :, :])
        if rest > 1:
            # Copied out of the padded block, which would otherwise be saved for backward.
            own.append(_cut(blocks[..., whole:, :, :], rest))
        found = own + found
    if dense == len(widths):
        return tuple(found)
    top = _cut(grids[-1], widths[-1])
    for blocks, width in zip(grids[dense:-1][::-1], widths[dense:-1][::-1], strict=True):
        top = _cut(_join(top.squeeze(-3), blocks).unsqueeze(-3), width)
    return (top, *found)


def _cut(blocks: Tensor, size: int) -> Tensor:
    """The first rows and columns of square blocks, copied."""
    surplus = size - blocks.shape[-1]
    if surplus and is_exported():
        return blocks[..., :size, :size]  # ONNX has no negative padding
    return pad(blocks, (0, surplus, 0, surplus)) if surplus else blocks


def _join(top: Tensor, blocks: Tensor) -> Tensor:
    """(I + T) on the first coordinates of K blocks, then the blocks I + B, as one matrix minus the identity.

    Args:
        top: T, (..., K, K).
        blocks: B, (..., K, b, b).

    Returns:
        (..., K b, K b).
    """
    count, size = blocks.shape[-3:-1]
    eye = torch.eye(count, dtype=top.dtype, device=top.device)
    first = torch.eye(1, size, dtype=top.dtype, device=top.device)
    diagonal = blocks.unsqueeze(-2) * eye[:, None, :, None]  # (..., K, b, K, b)
    mixed = top.unsqueeze(-1) * (blocks[..., 0, :] + first).unsqueeze(-3)  # what T adds to row 0 of each block
    return (diagonal + pad(mixed.unsqueeze(-3), (0, 0, 0, 0, 0, size - 1))).flatten(-2).flatten(-3, -2)


@made_once
def _ways(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """How the pairs and the blocks of all grids on n coordinates correspond.

    Returns:
        Indices into the entries of all pairs, row by row, followed by a zero: the entry that multiplies on the path to
        leaf i at level l of a block, for rows 0 and 1 of the pair, (2 · blocks · LEVELS · 32,). Positions in a block of
        the row and leaf of each path, ((LEVELS + 1) · 32,). And indices into the entries of all pairs of all blocks,
        (2, blocks, 31, 2), for each entry of each pair, (4 (n − 1),).
    """
    entries, places, inverse = [], [], []
    counts = [len(range(2**level, n, 2 ** (level + 1))) for level in range((n - 1).bit_length())]
    starts = [0, *accumulate(counts)]
    grids = [-(-width // _LEAF) for width in _widths(n)]
    rows = torch.arange(2, device=device)
    for grid, blocks in enumerate(grids):
        leaves = torch.arange(blocks * _LEAF, device=device)
        own = []
        for level in range(LEVELS):
            at, side = leaves >> (level + 1), leaves >> level & 1
            real = counts[grid * LEVELS + level] if grid * LEVELS + level < len(counts) else 0
            start = starts[grid * LEVELS + level] if real else 0
            own.append(torch.where(at < real, 4 * (start + at) + 2 * rows[:, None] + side, 4 * (n - 1)))
            pair = torch.arange(real, device=device)
            per_block = _LEAF >> (level + 1)
            slot = (sum(grids[:grid]) + pair // per_block) * (_LEAF - 1) + _LEAF - 2 * per_block + pair % per_block
            inverse.append(2 * (sum(grids) * (_LEAF - 1) * rows[:, None] + slot[:, None, None]) + rows)
        entries.append(torch.stack(own, 1).view(2, LEVELS, blocks, _LEAF).transpose(1, 2))
    leaves = torch.arange(_LEAF, device=device)
    for level in range(LEVELS):
        row = (leaves >> (level + 1) << (level + 1)) + 2**level
        places.append(row * _LEAF + leaves)
    places.append(leaves)
    return torch.cat(entries, 1).flatten(), torch.cat(places), torch.cat(inverse).flatten()


@made_once
def _units(levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The identity's entries on each path to leaf i: those of a pair's rows at each level, and from there down.

    Returns:
        (2, levels, 2^levels) and (levels, 2^levels): whether the leaf is on the row's own side, and whether all its
        bits below the level are zero.
    """
    leaves = torch.arange(2**levels, device=device)
    sides = torch.stack([leaves >> level & 1 for level in range(levels)])
    first = torch.stack([leaves % 2**level == 0 for level in range(levels)])
    return torch.stack([1 - sides, sides]).float(), first.float()


def _fold(pairs: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """M − I of all blocks of all grids, (..., blocks, 32, 32), from the pairs, and the tensors needed for backward.

    With p the product along a path from the top, u the same for the identity and a = G − I at one level, the difference
    q = p − u is accumulated by q ← q (a + 1) + u a, so that small rotations lose no digits.
    """
    entries, places, _ = _ways(n, pairs.device)
    own, above = (unit.to(pairs.dtype) for unit in _units(LEVELS, pairs.device))
    found = pad(pairs.flatten(-3), (0, 1)).index_select(-1, entries).view(*pairs.shape[:-3], 2, -1, LEVELS, _LEAF)
    full, change = found + own[:, None], found * above
    go_on, stop = full.unbind(-4)
    less, ends = change.unbind(-4)
    ways = [torch.zeros_like(less[..., 0, :]), less[..., 0, :]]
    for level in range(1, LEVELS):
        ways.append(torch.addcmul(less[..., level, :], ways[-1], go_on[..., level, :]))
    before = torch.stack(ways[:-1], -2)  # q of the levels below each
    values = torch.cat([torch.addcmul(ends, stop, before), ways[-1].unsqueeze(-2)], -2).flatten(-2)
    blocks = values.new_zeros(*values.shape[:-1], _LEAF * _LEAF).index_copy_(-1, places, values)
    return blocks.view(*blocks.shape[:-1], _LEAF, _LEAF), full, before + above


class _Blocks(torch.autograd.Function):
    """`_fold` with a backward of few operations, however many pairs there are."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, n: int) -> Tensor:
        blocks, *kept = _fold(pairs, n)
        ctx.save_for_backward(*kept)
        ctx.n = n
        return blocks

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        refuse_double_backward()
        full, before = ctx.saved_tensors
        _, places, inverse = _ways(ctx.n, gradient.device)
        values = gradient.flatten(-2).index_select(-1, places).view(*full.shape[:-4], -1, LEVELS + 1, _LEAF)
        go_on, stop = full.unbind(-4)
        ends = values[..., :LEVELS, :]
        ended = ends * stop
        ways = [values[..., LEVELS, :]]
        for level in range(LEVELS - 1, 0, -1):
            ways.append(torch.addcmul(ended[..., level, :], ways[-1], go_on[..., level, :]))
        # For each path to a leaf at a level; a pair's entry sums over all leaves on its side.
        each = torch.stack([torch.stack(ways[::-1], -2), ends], -4) * before.unsqueeze(-4)
        of_pairs = [each[..., level, :].unflatten(-1, (-1, 2, 2**level)).sum(-1) for level in range(LEVELS)]
        flat = torch.cat(of_pairs, -2).flatten(-4)
        return flat.index_select(-1, inverse).view(*flat.shape[:-1], ctx.n - 1, 2, 2), None


def pair_penalty(pairs: Tensor) -> Tensor:
    """Σ (a₁b₁ + a₂b₂)² over matrices [[a₁, b₁], [a₂, b₂]], (..., 2, 2), which is 0 if their columns are orthogonal.

    Source: Ma et al., GOFT (ICML 2024), the regulariser of qGOFT.
    """
    return (pairs[..., 0] * pairs[..., 1]).sum(-1).square().sum()
