"""Products of Householder reflections in compact form: two thin matrices, never an n × n one.

Directions are `vectors`, (..., r, n), of any length; M = I + left · right with left (..., n, r) and right (..., r, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.algebra.recording import inverse_by_products, is_exported


def unit_rows(vectors: Tensor) -> Tensor:
    """Each row divided by its norm; a zero row stays zero, which makes its reflection the identity."""
    largest = vectors.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    scaled: Tensor = vectors / largest  # so that no square overflows or vanishes
    norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(norms > 0, norms, 1.0)


def reflections(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right of the product of reflections M = H_r ⋯ H₂ H₁, H_i = I − 2 u_i u_iᵀ.

    On row vectors, x M; a weight W becomes W Mᵀ = W H₁ H₂ ⋯ H_r. With the units U (n, r), H₁ ⋯ H_r = I − U T Uᵀ, where
    T is upper triangular and T⁻¹ = ½ I + the strict upper triangle of UᵀU.

    Source: Yuan et al., HRA (NeurIPS 2024), equation 5; the compact form is that of Puglisi (1992).
    """
    units = unit_rows(vectors)
    gram = units @ units.mT
    half = torch.full_like(gram[..., 0], 0.5).diag_embed()
    upper = gram.triu(1) + half
    if is_exported():
        # I − upper · 2I is strictly triangular, so its powers vanish and the iteration ends at the inverse itself.
        inner = inverse_by_products(upper, 4 * half, steps=(int(upper.shape[-1]) - 1).bit_length()) @ units
    else:
        inner = torch.linalg.solve_triangular(upper, units, upper=True)  # T Uᵀ
    return _by_pairs(-inner, units)


def _by_pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """leftᵀ right, both (..., r, n), in terms of each pair's sum and half difference.

    Training starts with equal pairs, whose reflections cancel. In terms of the vectors themselves they would cancel
    only up to rounding, which in half precision is more than a small rotation; in these terms each product is small.
    """
    count = right.shape[-2] // 2 * 2
    first, second, rest = right[..., 0:count:2, :], right[..., 1:count:2, :], right[..., count:, :]
    one, two, last = left[..., 0:count:2, :], left[..., 1:count:2, :], left[..., count:, :]
    readers = torch.cat([one + two, 0.5 * (one - two), last], -2)
    writers = torch.cat([0.5 * (first + second), first - second, rest], -2)
    return readers.mT, writers


def orthonormal_reflection(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right of M = I − 2 U Uᵀ, r commuting reflections, with U from the Gram-Schmidt process.

    The directions must be linearly independent, so r ≤ n.

    Source: Yuan et al., HRA (NeurIPS 2024), the case λ = ∞.
    """
    orthonormal = torch.linalg.qr(vectors.mT).Q
    return -2 * orthonormal, orthonormal.mT


def reflection_penalty(vectors: Tensor) -> Tensor:
    """‖I − UᵀU‖²_F of the normalised directions, summed over leading dimensions.

    Source: Yuan et al., HRA (NeurIPS 2024), equation 7.
    """
    units = unit_rows(vectors)
    gram = units @ units.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum()
