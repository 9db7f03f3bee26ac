"""A frozen linear layer and a low-rank update of it on few tokens in Triton, as in decoding: two launches in all.

Imported only where a GPU's tensors are met, as `isotune.algebra.block_kernels` is; plain torch in
`isotune.adapter.kernels` is the twin. With few tokens a layer takes the time of reading its weight, and the products of
an update that of their launches. So x downᵀ is one launch, whose programs read a row of down each where cuBLAS would
split the sum and take two; and the rest is added to x Wᵀ before that is rounded, as it is stored.
"""

# Triton reads the annotations of its kernels' parameters, and knows its own alone.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotune.algebra.launching import are_rows, launch, power_of_two, tiles, work

DTYPES = (torch.bfloat16, torch.float16)
MOST_TOKENS = 16
"""The rows of the smallest tile that tensor cores take."""
LARGEST_RANK = 512
"""Of the update, whose coordinates are in the registers of each program."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel reads a matrix: `rows` of it by `step` columns at a time, `stages` of such tiles in flight."""

    rows: int
    step: int
    warps: int
    stages: int


# The fastest of fifteen on an H100 at the shapes of Llama 3.1 8B, where cuBLAS took 177 µs for a block's seven products
# with one token, the first 159, and the second with 16 tokens 182 where cuBLAS took 181.
ONE_TOKEN = Tiling(rows=4, step=1024, warps=4, stages=3)
SEVERAL = Tiling(rows=16, step=256, warps=4, stages=4)
DOWN = Tiling(rows=1, step=4096, warps=8, stages=1)
DOWN_SEVERAL = Tiling(rows=1, step=512, warps=8, stages=2)


@triton.jit(do_not_specialize=["tokens"])
def _product(
    x,
    matrix,
    y,
    bias,
    coordinates,
    up,
    tokens,
    inner,
    out,
    rank,
    x_stride,
    matrix_stride,
    up_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
    BIASED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = x matrixᵀ + bias + coordinates upᵀ on some rows of matrix; RANK 0 leaves the update out.

    Tensor cores multiply where there are several tokens and several rows; else one of the two is 1, and all lines of a
    tile are summed up at the end.
    """
    token = tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x += token[:, None] * x_stride
    matrix += row[:, None].to(tl.int64) * matrix_stride
    here, there = token[:, None] < tokens, row[:, None] < out
    if TOKENS > 1 and ROWS > 1:
        total = tl.zeros((TOKENS, ROWS), tl.float32)
    else:
        lines = tl.zeros((TOKENS * ROWS, STEP), tl.float32)
    for step in tl.range(0, tl.cdiv(inner, STEP), num_stages=STAGES):
        column = step * STEP + tl.arange(0, STEP)[None, :]
        tile = tl.load(x + column, mask=here & (column < inner), other=0.0)
        other = tl.load(matrix + column, mask=there & (column < inner), other=0.0)
        if TOKENS > 1 and ROWS > 1:
            total = tl.dot(tile, tl.trans(other), total)
        else:
            lines += tile.to(tl.float32) * other.to(tl.float32)
    if TOKENS == 1 or ROWS == 1:
        total = tl.reshape(tl.sum(lines, 1), (TOKENS, ROWS))
    if RANK > 0:
        place = tl.arange(0, RANK)[None, :]
        read = tl.load(coordinates + token[:, None] * rank + place, mask=here & (place < rank), other=0.0)
        factor = tl.load(up + row[:, None] * up_stride + place, mask=there & (place < rank), other=0.0)
        if TOKENS > 1:
            total = tl.dot(read, tl.trans(factor), total)
        else:
            total += tl.reshape(tl.sum(read.to(tl.float32) * factor.to(tl.float32), 1), (TOKENS, ROWS))
    if BIASED:
        total += tl.load(bias + row, mask=row < out, other=0.0).to(tl.float32)[None, :]
    places = y + token[:, None] * out + row[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=(token[:, None] < tokens) & (row[None, :] < out))


def can_multiply(x: Tensor, weight: Tensor, *factors: Tensor) -> bool:
    """Say whether the kernels take x (tokens, in), W (out, in) and other matrices, with no graph recorded."""
    if not work() or torch.is_grad_enabled() or x.dtype not in DTYPES or not 1 <= x.shape[0] <= MOST_TOKENS:
        return False
    return are_rows(x, x, weight, *factors) and all(min(factor.shape) <= LARGEST_RANK for factor in factors)


def linear_with_update(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor | None:
    """x Wᵀ + b + (x downᵀ) upᵀ, summed in float32 and rounded once, x downᵀ by itself.

    Args:
        x: (tokens, in), as `can_multiply` takes it with the others but b.
        weight: (out, in).
        bias: (out,), contiguous, or None.
        down, up: (r, in) and (out, r).

    Returns:
        (tokens, out), or None where Triton cannot run.
    """
    coordinates = x.new_empty(x.shape[0], down.shape[0])
    if not _launch(x, down, coordinates, DOWN if x.shape[0] == 1 else DOWN_SEVERAL):
        return None
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y if _launch(x, weight, y, ONE_TOKEN if x.shape[0] == 1 else SEVERAL, bias, coordinates, up) else None


def _launch(
    x: Tensor,
    matrix: Tensor,
    y: Tensor,
    tiling: Tiling,
    bias: Tensor | None = None,
    coordinates: Tensor | None = None,
    up: Tensor | None = None,
) -> bool:
    (tokens, inner), out = x.shape, y.shape[1]
    rank, stride = (0, 0) if up is None else (up.shape[1], up.stride(0))
    others = (x if one is None else one for one in (bias, coordinates, up))  # the kernel reads none that is not given
    sizes = tokens, inner, out, rank, x.stride(0), matrix.stride(0), stride
    tile = 1 if tokens == 1 else MOST_TOKENS, tiling.rows, min(tiling.step, power_of_two(inner, least=16))
    padded = power_of_two(rank, least=16) if rank else 0
    given = x, matrix, y, *others, *sizes, *tile, padded, bias is not None, tiling.stages
    return launch(_product, (tiles(out, tiling.rows),), given, num_warps=tiling.warps)
