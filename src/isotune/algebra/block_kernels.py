"""Block rotations in Triton: x (I + D) and both of its gradients, with one read and one write of x.

Imported only for tensors on a GPU, since Triton is not installed everywhere. Plain torch in `isotune.algebra.factors`
is the reference that these kernels are tested against, and is used where they cannot run.

A program processes a tile of rows by `WIDTH` columns, which holds one or more blocks side by side: as a block-diagonal
matrix they are one operand of tensor cores, and a row of the tile is at least 128 bytes of memory whatever b is.
Multiplying the zeros beside the blocks costs little compared to reading x.
"""

# Triton reads the annotations of its kernels' parameters, and knows only its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter

from isotune.algebra.launching import are_rows, launch, tiles, work

SIZES = {torch.bfloat16: (8, 16, 32, 64), torch.float16: (8, 16, 32, 64), torch.float32: (8, 16, 32)}
"""Dtype -> block sizes b for which the kernels are used; `benchmarks/block_kernels.py` measures whether they pay.

Float32 is multiplied without tensor cores, which would round to TF32; for b = 64 there are too few registers for that.
"""


@dataclass
class Tiling:
    """How a kernel divides its work, for all b."""

    rows: int
    """Rows of a tile of 16-bit numbers; half as many for float32."""
    warps: int
    stages: int
    """Tiles in flight in a loop over rows."""


FORWARD = Tiling(rows=64, warps=4, stages=1)
BACKWARD = Tiling(rows=64, warps=4, stages=3)
PROGRAMS = 128
"""Backward narrows the tiles and then splits the rows until there are this many programs, about one per multiprocessor
of an H100; sums over splits need launches of their own. The same on every device, so that sums are added in the same
order."""
FEW_ROWS = 16
"""Rows of the smallest tile that tensor cores support, for decoding."""


@triton.jit
def _block_tile(blocks, columns, n, block_stride, row_stride, column_stride, SIZE: tl.constexpr):
    """The blocks on these columns as one block-diagonal matrix (WIDTH, WIDTH)."""
    across, down = columns[None, :], columns[:, None]
    own = (down // SIZE == across // SIZE) & (down < n) & (across < n)
    places = (down // SIZE) * block_stride + (down % SIZE) * row_stride + (across % SIZE) * column_stride
    return tl.load(blocks + places, mask=own, other=0.0)


@triton.jit
def _firsts(firsts, rows, columns, inside, n, SIZE: tl.constexpr):
    """Addresses of the entries for each block's first column, (tokens, n / b), and a mask of those columns."""
    return firsts + rows.to(tl.int64) * (n // SIZE) + columns // SIZE, inside & (columns % SIZE == 0)


@triton.jit
def _with_firsts(tile, firsts, rows, columns, inside, n, SIZE: tl.constexpr):
    """A tile with values added to the first column of each block, rounded as if the sum had been stored."""
    places, first = _firsts(firsts, rows, columns, inside, n, SIZE)
    return (tile.to(tl.float32) + tl.load(places, mask=first, other=0.0).to(tl.float32)).to(tile.dtype)


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    x,
    blocks,
    y,
    firsts,
    tokens,
    n,
    x_stride,
    y_stride,
    block_stride,
    row_stride,
    column_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
):
    """y = x (I + D) on one tile."""
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (rows < tokens) & (columns[None, :] < n)
    matrix = _block_tile(blocks, columns, n, block_stride, row_stride, column_stride, SIZE)
    tile = tl.load(x + rows.to(tl.int64) * x_stride + columns[None, :], mask=inside, other=0.0)
    if HAS_FIRSTS:
        tile = _with_firsts(tile, firsts, rows, columns[None, :], inside, n, SIZE)
    result = tile.to(tl.float32) + tl.dot(tile, matrix, input_precision="ieee")
    tl.store(y + rows.to(tl.int64) * y_stride + columns[None, :], result.to(tile.dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _rotate_backward(
    x,
    gradient,
    blocks,
    grad_x,
    sums,
    firsts,
    grad_firsts,
    tokens,
    n,
    steps,
    x_stride,
    gradient_stride,
    grad_x_stride,
    block_stride,
    row_stride,
    column_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    NEEDS_X: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of x on `steps` tiles below each other, and their contribution to the gradients of the blocks."""
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    across, down = columns[None, :], columns[:, None]
    if NEEDS_X:
        transposed = _block_tile(blocks, columns, n, block_stride, column_stride, row_stride, SIZE)
    total = tl.zeros((WIDTH, WIDTH), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (tl.program_id(1) * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (rows < tokens) & (across < n)
        x_tile = tl.load(x + rows.to(tl.int64) * x_stride + across, mask=inside, other=0.0)
        g_tile = tl.load(gradient + rows.to(tl.int64) * gradient_stride + across, mask=inside, other=0.0)
        if HAS_FIRSTS:
            x_tile = _with_firsts(x_tile, firsts, rows, across, inside, n, SIZE)
        total = tl.dot(tl.trans(x_tile), g_tile, total, input_precision="ieee")
        if NEEDS_X:
            result = g_tile.to(tl.float32) + tl.dot(g_tile, transposed, input_precision="ieee")
            tl.store(grad_x + rows.to(tl.int64) * grad_x_stride + across, result.to(g_tile.dtype), mask=inside)
            if HAS_FIRSTS:
                places, first = _firsts(grad_firsts, rows, across, inside, n, SIZE)
                tl.store(places, result.to(g_tile.dtype), mask=first)
    # Only pairs of columns within one block; sums (splits, n / b, b, b) is contiguous.
    own = (down // SIZE == across // SIZE) & (down < n) & (across < n)
    places = tl.program_id(1).to(tl.int64) * n * SIZE + down * SIZE + across % SIZE
    tl.store(sums + places, total.to(sums.dtype.element_ty), mask=own)


def can_rotate(blocks: Tensor, *rows: Tensor) -> bool:
    """Whether the kernels support these tensors: blocks (n / b, b, b) and others (tokens, n), with no graph recorded.

    They do not support tensors without values or subclasses of torch.Tensor, and are not used in code that
    torch.compile traces, where inductor makes its own kernels from plain operations.
    """
    if not work() or torch.is_grad_enabled() or blocks.shape[-1] not in SIZES.get(blocks.dtype, ()):
        return False
    return (type(blocks) is Tensor or type(blocks) is Parameter) and are_rows(blocks, *rows)


def _tiles(x: Tensor, size: int, tiling: Tiling) -> tuple[int, int, int]:
    """The width of a tile, the number of tiles side by side, and the rows of a tile."""
    tokens, n = x.shape
    itemsize = x.element_size()
    width = max(size, 128 // itemsize)
    return width, tiles(n, width), FEW_ROWS if tokens <= FEW_ROWS else tiling.rows * 2 // itemsize


def rotate_blocks(x: Tensor, blocks: Tensor, in_place: bool = False, firsts: Tensor | None = None) -> Tensor | None:
    """x (I + D) for block-diagonal D, summed in float32 and rounded once, so that D = 0 changes no bit.

    An infinite or NaN entry may affect all columns of its row in the tile, not just those of its block.

    Args:
        x: (tokens, n), as supported by `can_rotate`.
        blocks: (n / b, b, b), of any strides, so that D transposed is a view.
        in_place: write to x.
        firsts: (tokens, n / b), contiguous, added to the first column of each block of x beforehand; or None.

    Returns:
        (tokens, n), or None if Triton cannot run; x is then unchanged.
    """
    y = x if in_place else x.new_empty(x.shape)
    (tokens, n), size = x.shape, blocks.shape[-1]
    width, side_by_side, rows = _tiles(x, size, FORWARD)
    sizes = size, width, rows, firsts is not None
    given = x, blocks, y, x if firsts is None else firsts, tokens, n, x.stride(0), y.stride(0), *blocks.stride(), *sizes
    grid = side_by_side, tiles(tokens, rows)
    return y if launch(_rotate, grid, given, num_warps=FORWARD.warps, num_stages=FORWARD.stages) else None


def rotate_blocks_backward(
    x: Tensor,
    gradient: Tensor,
    blocks: Tensor,
    needs_x: bool,
    in_place: bool = False,
    firsts: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None] | None:
    """The gradients of x, the blocks and `firsts` from that of x (I + D), in one pass over both.

    Sums over tokens are taken in float32, in an order that depends only on the shapes.

    Args:
        x, gradient: (tokens, n), as supported by `can_rotate`.
        blocks: (n / b, b, b), of any strides.
        needs_x: whether the gradient of x is needed.
        in_place: write it to `gradient`.
        firsts: as in `rotate_blocks`.

    Returns:
        (tokens, n) or None, (n / b, b, b) in the dtype of x, and (tokens, n / b) if there are firsts and the gradient
        of x is needed; None if Triton cannot run, and then nothing is changed.
    """
    grad_x = gradient if in_place or not needs_x else gradient.new_empty(gradient.shape)
    (tokens, n), (count, size, _) = x.shape, blocks.shape
    width, side_by_side, rows = _tiles(x, size, BACKWARD)
    if side_by_side < PROGRAMS and width // 2 >= max(size, 16):
        width, side_by_side = width // 2, tiles(n, width // 2)
    below = tiles(tokens, rows)
    # Not split if that gave each multiprocessor less than one and a half programs: summing splits takes two launches.
    steps = tiles(below, max(1, PROGRAMS // side_by_side))
    splits = tiles(below, steps)
    sums = x.new_empty(splits, count, size, size, dtype=x.dtype if splits == 1 else torch.float32)
    strides = x.stride(0), gradient.stride(0), grad_x.stride(0), *blocks.stride()
    grad_firsts = firsts if firsts is None or not needs_x else torch.empty_like(firsts)
    first_columns = (x, x) if firsts is None else (firsts, grad_firsts)
    given = x, gradient, blocks, grad_x, sums, *first_columns, tokens, n, steps
    options = size, width, rows, needs_x, firsts is not None, BACKWARD.stages
    if not launch(_rotate_backward, (side_by_side, splits), (*given, *strides, *options), num_warps=BACKWARD.warps):
        return None
    total = sums[0] if splits == 1 else sums.sum(0).to(x.dtype)
    return (grad_x, total, grad_firsts) if needs_x else (None, total, None)
