"""Products of Householder reflections in compact form: two thin matrices instead of an n × n one.

Directions are `vectors`, (..., r, n), of any length; M = I + left · right with left (..., n, r) and right (..., r, n).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.algebra.factors import refuse_double_backward
from isotune.algebra.recording import inverse_by_products, is_exported, is_plain


class _UnitRows(torch.autograd.Function):
    """Rows divided by their norms, with a backward of few operations: du = (dv − u (u · dv)) / ‖v‖."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        units, norms = _unit_rows(vectors)
        ctx.save_for_backward(units, norms)
        return units

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        refuse_double_backward()
        units, norms = ctx.saved_tensors
        along = (units * gradient).sum(-1, keepdim=True)
        found: Tensor = torch.addcmul(gradient, units, along, value=-1) / norms
        return found


def _unit_rows(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Each row divided by its norm, and the norms, (..., r, 1), which are 1 for zero rows."""
    largest = vectors.abs().amax(-1, keepdim=True)
    largest = largest + (largest == 0)
    scaled = vectors / largest  # so that no square overflows or vanishes
    norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    norms = norms + (norms == 0)
    return scaled / norms, norms * largest


def unit_rows(vectors: Tensor) -> Tensor:
    """Each row divided by its norm, differentiable once; a zero row stays zero, so its reflection is the identity."""
    if is_plain():
        return _unit_rows(vectors)[0]
    units: Tensor = _UnitRows.apply(vectors)  # type: ignore[no-untyped-call]
    return units


def reflections(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right factors of the product of reflections M = H_r ⋯ H₂ H₁, H_i = I − 2 u_i u_iᵀ.

    M acts on row vectors, x M; a weight W becomes W Mᵀ = W H₁ H₂ ⋯ H_r. With the unit directions U (n, r),
    H₁ ⋯ H_r = I − U T Uᵀ, where T is upper triangular and T⁻¹ = ½ I + the strict upper triangle of UᵀU.

    Source: Yuan et al., HRA (NeurIPS 2024), equation 5; the compact form is that of Puglisi (1992).
    """
    units = unit_rows(vectors)
    gram = units @ units.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    upper = -0.5 * eye - gram.triu(1)
    if is_exported():
        # I + upper · 2I is strictly triangular, so its powers vanish and the iteration ends at the exact inverse.
        steps = (int(upper.shape[-1]) - 1).bit_length()
        left = inverse_by_products(upper, (-2 * eye).expand_as(upper), steps) @ units
    else:
        left = torch.linalg.solve_triangular(upper, units, upper=True)  # −T Uᵀ
    # Training starts with equal pairs, whose reflections cancel. Expressed in the vectors themselves, they would cancel
    # only up to rounding, which in half precision exceeds a small rotation; in each pair's sum and half difference,
    # each product is small.
    return _mixed(left, 1.0, 0.5).mT, _mixed(units, 0.5, 1.0)


def _mixed(rows: Tensor, of_sum: float, of_difference: float) -> Tensor:
    """Sums of neighbouring rows, their differences, and the last row of an odd number, each times its factor."""
    count = rows.shape[-2]
    even, rest = torch.split(rows, [count // 2 * 2, count % 2], -2)
    first, second = even.view(*rows.shape[:-2], count // 2, 2, rows.shape[-1]).unbind(-2)
    return torch.cat([of_sum * (first + second), of_difference * (first - second), rest], -2)


def orthonormal_reflection(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right factors of M = I − 2 U Uᵀ, r commuting reflections, with U from the Gram-Schmidt process.

    The directions must be linearly independent, so r ≤ n.

    Source: Yuan et al., HRA (NeurIPS 2024), the case λ = ∞.
    """
    orthonormal = torch.linalg.qr(vectors.mT).Q
    return -2 * orthonormal, orthonormal.mT


def reflection_penalty(vectors: Tensor) -> Tensor:
    """‖I − UᵀU‖²_F of the normalised directions, summed over leading dimensions.

    Source: Yuan et al., HRA (NeurIPS 2024), equation 7.
    """
    units, _ = _unit_rows(vectors)  # differentiated by torch itself: a penalty has a second derivative
    gram = units @ units.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum()
