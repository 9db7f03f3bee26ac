"""The backward pass of a layer's output gain in Triton: one read and one write instead of three.

Imported only for tensors on a GPU, like `isotune.algebra.block_kernels`; plain torch in `isotune.adapter.kernels` is
the reference.
"""

# Triton reads the annotations of its kernels' parameters, and knows only its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isotune.algebra.launching import are_rows, launch, tiles, work

ROWS, COLUMNS, WARPS, STAGES = 64, 32, 4, 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    rows,
    gradient,
    gain,
    sums,
    tokens,
    out,
    rows_stride,
    gradient_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums over all tokens of some columns, in the same order on every GPU."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    factor = tl.load(gain + column, mask=column < out, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), gain.dtype.element_ty)
    for step in tl.range(0, tl.cdiv(tokens, ROWS), num_stages=STAGES):
        row = (step * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < tokens) & (column < out)
        own = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(total.dtype)
        total += own * tl.load(rows + row * rows_stride + column, mask=inside, other=0.0).to(total.dtype)
        tl.store(rows + row * rows_stride + column, (own * factor).to(rows.dtype.element_ty), mask=inside)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + at, tl.sum(total, 0), mask=at < out)


def can_scale(rows: Tensor, gradient: Tensor, gain: Tensor) -> bool:
    """Whether the kernel supports these: two (tokens, out) of one dtype, and (out,) in float32; no graph recorded."""
    if not work() or torch.is_grad_enabled() or rows.dtype not in DTYPES or gain.dtype != torch.float32:
        return False
    return are_rows(rows, rows, gradient) and are_rows(gain, gain[None]) and gain.device == rows.device


def gain_backward(rows: Tensor, gradient: Tensor, gain: Tensor) -> Tensor | None:
    """The gradient of a gain from that of gain ⊙ rows; the gradient of `rows` is written in their place.

    Args:
        rows: (tokens, out), overwritten by gradient ⊙ gain.
        gradient: (tokens, out), that of gain ⊙ rows.
        gain: (out,).

    Returns:
        (out,), Σ gradient ⊙ rows over the tokens; None if Triton cannot run, and then nothing is changed.
    """
    (tokens, out), sums = rows.shape, torch.empty_like(gain)
    given = rows, gradient, gain, sums, tokens, out, rows.stride(0), gradient.stride(0), ROWS, COLUMNS, STAGES
    return sums if launch(_backward, (tiles(out, COLUMNS),), given, num_warps=WARPS) else None
