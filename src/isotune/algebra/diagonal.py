"""Operators scaled by diagonal matrices on both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.algebra.recording import is_plain


class _ScaledDifference(torch.autograd.Function):
    """`scaled_difference` with few passes over memory, saving only its arguments."""

    @staticmethod
    def forward(difference: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        result = difference * alpha[..., :, None]
        result.mul_(beta[..., None, :])
        result.diagonal(dim1=-2, dim2=-1).add_((alpha - 1) + alpha * (beta - 1))
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        difference, alpha, beta = ctx.saved_tensors
        by_row = gradient * alpha[..., :, None]
        diagonal = gradient.diagonal(dim1=-2, dim2=-1)
        products = gradient * difference
        grad_alpha = (products @ beta[..., None]).squeeze(-1) + diagonal * beta
        grad_beta = (alpha[..., None, :] @ products).squeeze(-2) + diagonal * alpha
        return by_row.mul_(beta[..., None, :]), grad_alpha, grad_beta


def scaled_difference(difference: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """diag(α) R diag(β) − I from N = R − I, as diag(α) N diag(β) + diag((α − 1) + α(β − 1)).

    In this form, a result near zero keeps its relative precision.

    Args:
        difference: N, (..., n, n).
        alpha, beta: (..., n), the factors of the rows and columns.

    Returns:
        (..., n, n), differentiable twice.
    """
    if is_plain():
        diagonal = (alpha - 1) + alpha * (beta - 1)
        return difference * alpha[..., :, None] * beta[..., None, :] + diagonal.diag_embed()
    result: Tensor = _ScaledDifference.apply(difference, alpha, beta)  # type: ignore[no-untyped-call]
    return result
