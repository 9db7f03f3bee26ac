"""The Cayley transform in Triton: Gauss–Jordan elimination of many skew-symmetric matrices at once, in float32.

Imported only for tensors on a GPU, like `isotune.algebra.block_kernels`. The factorisation in `isotune.algebra.cayley`
is used where these kernels cannot run; cuBLAS and MAGMA take milliseconds for a few hundred small matrices, and
allocate memory, so that no CUDA graph can capture them.

R − I = 2 ((I − Q)⁻¹ − I). What is computed, in the place of −Q, is T = (I − Q)⁻¹ − I: before and after each step of the
elimination, the matrix is stored minus the identity. So nothing small is added to a one, and a small rotation keeps its
relative precision. No pivoting is needed: the symmetric part of I − Q is I, so every pivot is at least 1. That bounds
the growth of rounding errors by about ‖Q‖². One Newton–Schulz step, D ← D − ½ (I + D)(D + Dᵀ + DᵀD), squares the
resulting orthogonality error.

No product is rounded to TF32, whatever torch's own setting.
"""

# Triton reads the annotations of its kernels' parameters, and knows only its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotune.algebra.launching import launch, power_of_two, tiles, work

BLOCK = 64
"""Matrices up to this size fit the registers of one program; larger ones are eliminated in blocks of this size."""
MATRICES = {8: 8, 16: 2, 32: 1, 64: 1}
"""Padded size -> matrices per program."""
WARPS = {8: 1, 16: 1, 32: 1, 64: 4}
"""Padded size -> warps per program."""
DEPTH = 16
"""Terms of a product that are in registers at a time: without tensor cores a thread holds all of its operands."""
PRODUCT_WARPS = 4
LARGEST = 4096
"""Largest size for which rounding errors, and the time of one program per diagonal block, have been measured."""


@triton.jit
def _tiles(start, first, count, n, size, SIZE: tl.constexpr, MATRICES: tl.constexpr):
    """(MATRICES, SIZE, SIZE) of `count` matrices (n, n), zero beyond `size` rows and columns.

    They are loaded in pieces of 4 × 8, the last two dimensions, so that Triton gives each warp such a piece whatever n
    is: with its own choice, a row of 32 for most n, sums along rows need three times as many shuffles and spill
    registers.
    """
    matrices = first + tl.arange(0, MATRICES)[:, None, None, None, None]
    rows = 4 * tl.arange(0, SIZE // 4)[None, :, None, None, None] + tl.arange(0, 4)[None, None, None, :, None]
    columns = 8 * tl.arange(0, SIZE // 8)[None, None, :, None, None] + tl.arange(0, 8)[None, None, None, None, :]
    inside = (matrices < count) & (rows < size) & (columns < size)
    pieces = tl.load(start + matrices.to(tl.int64) * n * n + rows * n + columns, mask=inside, other=0.0)
    return tl.reshape(tl.permute(pieces, (0, 1, 3, 2, 4)), (MATRICES, SIZE, SIZE))


@triton.jit
def _eliminate(tile, n, SIZE: tl.constexpr):
    """(I + A)⁻¹ − I of tiles A (matrices, SIZE, SIZE) whose first n rows and columns may be nonzero."""
    rows, columns = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    for k in range(n):
        column = tl.sum(tl.where(columns == k, tile, 0.0), 2, keep_dims=True)
        row = tl.sum(tl.where(rows == k, tile, 0.0), 1, keep_dims=True)
        excess = tl.sum(tl.where(columns == k, row, 0.0), 2, keep_dims=True)  # of the pivot over 1
        inverse = 1.0 / (1.0 + excess)
        # A unit column replaces column k and becomes the inverse's by the same operations as the other columns.
        row = tl.where(columns == k, inverse, row * inverse)
        cleared = tl.where(columns == k, 0.0, tile) - column * row
        tile = tl.where(rows == k, tl.where(columns == k, -excess * inverse, row), cleared)
    return tile


@triton.jit(do_not_specialize=["count"])
def _whole(generator, result, count, n, SIZE: tl.constexpr, MATRICES: tl.constexpr):
    """R − I of MATRICES matrices, padded with zeros to SIZE."""
    matrices = tl.program_id(0) * MATRICES + tl.arange(0, MATRICES)[:, None, None]
    rows, columns = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    places = matrices.to(tl.int64) * n * n + rows * n + columns
    inside = (matrices < count) & (rows < n) & (columns < n)
    generators = _tiles(generator, tl.program_id(0) * MATRICES, count, n, n, SIZE, MATRICES)
    difference = 2.0 * _eliminate(-generators, n, SIZE)
    defect = difference + tl.permute(difference, (0, 2, 1))  # RᵀR − I
    for k in range(n):
        row = tl.sum(tl.where(rows == k, difference, 0.0), 1, keep_dims=True)
        defect += tl.permute(row, (0, 2, 1)) * row
    turned = defect
    for k in range(n):
        column = tl.sum(tl.where(columns == k, difference, 0.0), 2, keep_dims=True)
        turned += column * tl.sum(tl.where(rows == k, defect, 0.0), 1, keep_dims=True)
    tl.store(result + places, difference - 0.5 * turned, mask=inside)


@triton.jit
def _product(
    left, right, rows, columns, height, depth, width, left_row, left_column, right_row, SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """left @ right on SIZE rows and columns, of matrices (height, depth) and (depth, width)."""
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(0, depth, DEPTH):
        inner = first + tl.arange(0, DEPTH)
        across, down = inner[None, :], inner[:, None]
        one = tl.load(left + rows * left_row + across * left_column, mask=(rows < height) & (across < depth), other=0.0)
        other = tl.load(right + down * right_row + columns, mask=(down < depth) & (columns < width), other=0.0)
        total = tl.dot(one, other, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["k"])
def _diagonal(source, panel, n, k, SIZE: tl.constexpr):
    """Eliminate block k of the diagonal, F = (I + A_kk)⁻¹ − I, into block k of the panel (SIZE, n)."""
    matrix, size = tl.program_id(0), tl.minimum(n - k * SIZE, SIZE)
    tile = _tiles(source + k * SIZE * (n + 1), matrix, tl.num_programs(0), n, size, SIZE, 1)
    rows, columns = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    places = panel + matrix.to(tl.int64) * SIZE * n + rows * n + k * SIZE + columns
    tl.store(places, _eliminate(tile, size, SIZE), mask=(rows < size) & (columns < size))


@triton.jit(do_not_specialize=["k", "blocks"])
def _row(source, panel, n, k, blocks, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """The other blocks of row k, (I + F) A_kj, into the panel."""
    matrix = (tl.program_id(0) // (blocks - 1)).to(tl.int64)
    j = tl.program_id(0) % (blocks - 1)
    j += j >= k
    rows, columns = tl.arange(0, SIZE)[:, None], j * SIZE + tl.arange(0, SIZE)[None, :]
    height = tl.minimum(n - k * SIZE, SIZE)
    source += matrix * n * n + k * SIZE * n
    panel += matrix * SIZE * n
    inside = (rows < height) & (columns < n)
    total = _product(panel + k * SIZE, source, rows, columns, height, height, n, n, 1, n, SIZE, DEPTH)
    total += tl.load(source + rows * n + columns, mask=inside, other=0.0)
    tl.store(panel + rows * n + columns, total, mask=inside)


@triton.jit(do_not_specialize=["k", "blocks"])
def _others(source, target, panel, n, k, blocks, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """Block (i, j) after step k with the panel U: U_j in row k, else A_ij − A_ik U_j, and −A_ik − A_ik F for j = k.

    It is written to another matrix, since other programs still read the blocks A_ik.
    """
    matrix = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    i, j = tl.program_id(0) // blocks % blocks, tl.program_id(0) % blocks
    below, columns = tl.arange(0, SIZE)[:, None], j * SIZE + tl.arange(0, SIZE)[None, :]
    rows = i * SIZE + below
    inside = (rows < n) & (columns < n)
    source += matrix * n * n
    panel += matrix * SIZE * n
    if i == k:
        tile = tl.load(panel + below * n + columns, mask=inside, other=0.0)
    else:
        tile = tl.load(source + rows * n + columns, mask=inside, other=0.0)
        depth = tl.minimum(n - k * SIZE, SIZE)
        tile = tl.where(j == k, -tile, tile) - _product(
            source + k * SIZE, panel, rows, columns, n, depth, n, n, 1, n, SIZE, DEPTH
        )
    tl.store(target + matrix * n * n + rows * n + columns, tile, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _polish(half, defect, result, n, blocks, SIZE: tl.constexpr, DEPTH: tl.constexpr, FIRST: tl.constexpr):
    """For D = 2 T: first its defect E = D + Dᵀ + DᵀD, then D − ½ (E + D E)."""
    matrix = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    i, j = tl.program_id(0) // blocks % blocks, tl.program_id(0) % blocks
    rows, columns = i * SIZE + tl.arange(0, SIZE)[:, None], j * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (rows < n) & (columns < n)
    half += matrix * n * n
    defect += matrix * n * n
    tile = tl.load(half + rows * n + columns, mask=inside, other=0.0)
    if FIRST:
        total = _product(half, half, rows, columns, n, n, n, 1, n, n, SIZE, DEPTH)
        mirrored = tl.load(half + columns * n + rows, mask=inside, other=0.0)
        tl.store(defect + rows * n + columns, 2.0 * (tile + mirrored) + 4.0 * total, mask=inside)
    else:
        total = _product(half, defect, rows, columns, n, n, n, n, 1, n, SIZE, DEPTH)
        total += 0.5 * tl.load(defect + rows * n + columns, mask=inside, other=0.0)
        tl.store(result + matrix * n * n + rows * n + columns, 2.0 * tile - total, mask=inside)


def can_eliminate(generator: Tensor) -> bool:
    """Whether the kernels support this batch (count, n, n): contiguous float32 with values, and not empty."""
    return (
        work()
        and type(generator) is Tensor
        and generator.dtype == torch.float32
        and generator.is_contiguous()
        and len(generator) > 0
        and 2 <= generator.shape[-1] <= LARGEST
    )


def cayley_by_elimination(generator: Tensor) -> Tensor | None:
    """R − I for R = (I + Q)(I − Q)⁻¹, in float32 throughout.

    This takes one launch up to n = 64; beyond, three for every 64 columns, two for the polishing step and one for −Q.

    Args:
        generator: Q (count, n, n), skew-symmetric, as supported by `can_eliminate`.

    Returns:
        (count, n, n), or None if Triton cannot run.
    """
    count, n, _ = generator.shape
    if n <= BLOCK:
        size = power_of_two(n, least=8)
        result, matrices = torch.empty_like(generator), MATRICES[size]
        given = generator, result, count, n, size, matrices
        started = launch(_whole, (tiles(count, matrices),), given, num_warps=WARPS[size])
        return result if started else None
    blocks = tiles(n, BLOCK)
    source, target = -generator, torch.empty_like(generator)
    panel = generator.new_empty(count, BLOCK, n)
    options = {"num_warps": PRODUCT_WARPS}
    for k in range(blocks):
        started = (
            launch(_diagonal, (count,), (source, panel, n, k, BLOCK), num_warps=WARPS[BLOCK])
            and launch(_row, (count * (blocks - 1),), (source, panel, n, k, blocks, BLOCK, DEPTH), **options)
            and launch(_others, (count * blocks**2,), (source, target, panel, n, k, blocks, BLOCK, DEPTH), **options)
        )
        if not started:
            return None
        source, target = target, source
    result = torch.empty_like(generator)
    for first in (True, False):
        if not launch(
            _polish, (count * blocks**2,), (source, target, result, n, blocks, BLOCK, DEPTH, first), **options
        ):
            return None
    return result
