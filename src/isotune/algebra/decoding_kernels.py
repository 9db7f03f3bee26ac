"""A frozen linear layer with a low-rank update on one token in Triton, as in decoding, in two launches.

Imported only for tensors on a GPU, like `isotune.algebra.block_kernels`; plain torch in `isotune.adapter.kernels` is
the reference. For one token, a layer takes as long as reading its weight, and the products of an update as long as
their launches. So x downᵀ is one launch, whose programs each read a row of down (cuBLAS would split the sum and need
two), and the rest is added to x Wᵀ before that is rounded and stored.
"""

# Triton reads the annotations of its kernels' parameters, and knows only its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotune.algebra.launching import are_rows, launch, power_of_two, tiles, work

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_RANK = 512
"""Largest rank of the update, whose coordinates each program holds in registers."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel reads a matrix: in tiles of `rows` by `step` columns, `stages` of them in flight."""

    rows: int
    step: int
    warps: int
    stages: int


# The fastest of eight and of four on an H100 at the shapes of Llama 3.1 8B (docs/evidence/speed.md).
LAYER = Tiling(rows=4, step=1024, warps=4, stages=3)
DOWN = Tiling(rows=1, step=4096, warps=8, stages=1)


@triton.jit
def _product(
    x,
    matrix,
    y,
    bias,
    coordinates,
    up,
    inner,
    out,
    rank,
    matrix_stride,
    up_stride,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
    BIASED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = x matrixᵀ + bias + coordinates upᵀ on some rows of matrix; RANK 0 omits the update."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < out
    matrix += row[:, None].to(tl.int64) * matrix_stride
    lines = tl.zeros((ROWS, STEP), tl.float32)
    for step in tl.range(0, tl.cdiv(inner, STEP), num_stages=STAGES):
        column = step * STEP + tl.arange(0, STEP)
        own = tl.load(x + column, mask=column < inner, other=0.0).to(tl.float32)
        tile = tl.load(matrix + column[None, :], mask=there[:, None] & (column[None, :] < inner), other=0.0)
        lines += own[None, :] * tile.to(tl.float32)
    total = tl.sum(lines, 1)
    if RANK > 0:
        place = tl.arange(0, RANK)
        read = tl.load(coordinates + place, mask=place < rank, other=0.0).to(tl.float32)
        inside = there[:, None] & (place[None, :] < rank)
        factor = tl.load(up + row[:, None].to(tl.int64) * up_stride + place[None, :], mask=inside, other=0.0)
        total += tl.sum(factor.to(tl.float32) * read[None, :], 1)
    if BIASED:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=there)


def can_multiply(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> bool:
    """Whether the kernels support x (1, in), W (out, in), b (out,) or None, and the factors, with no graph recorded."""
    if x.shape[0] != 1 or x.dtype not in DTYPES or down.shape[0] > LARGEST_RANK or torch.is_grad_enabled():
        return False
    return work() and are_rows(x, x, weight, down, up) and (bias is None or are_rows(x, bias[None]))


def linear_with_update(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor | None:
    """x Wᵀ + b + (x downᵀ) upᵀ, summed in float32; x downᵀ and the result are each rounded once.

    Args:
        x: (1, in), as supported by `can_multiply` with the others.
        weight: (out, in).
        bias: (out,), or None.
        down, up: (r, in) and (out, r).

    Returns:
        (1, out), or None if Triton cannot run.
    """
    coordinates = x.new_empty(1, down.shape[0])
    if not _launch(x, down, coordinates, DOWN):
        return None
    y = x.new_empty(1, weight.shape[0])
    return y if _launch(x, weight, y, LAYER, bias, coordinates, up) else None


def _launch(
    x: Tensor,
    matrix: Tensor,
    y: Tensor,
    tiling: Tiling,
    bias: Tensor | None = None,
    coordinates: Tensor | None = None,
    up: Tensor | None = None,
) -> bool:
    inner, out = x.shape[1], y.shape[1]
    rank, stride = (0, 0) if up is None else (up.shape[1], up.stride(0))
    others = (x if one is None else one for one in (bias, coordinates, up))  # x stands for None; it is not read
    options = tiling.rows, min(tiling.step, power_of_two(inner)), power_of_two(rank) if rank else 0, bias is not None
    given = x, matrix, y, *others, inner, out, rank, matrix.stride(0), stride, *options, tiling.stages
    return launch(_product, (tiles(out, tiling.rows),), given, num_warps=tiling.warps)
