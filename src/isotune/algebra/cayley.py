"""The Cayley transform R = (I + Q)(I − Q)⁻¹ of a skew-symmetric generator, exact and by a Neumann series.

Everything is returned as the difference R − I: near the identity, where training starts and mostly stays, the
difference keeps its relative precision, which R itself would lose to the leading one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotune.algebra.acceleration import kernels_for
from isotune.algebra.recording import inverse_by_products, is_exported, is_plain
from isotune.algebra.skew import generator_scale, skew_from_vector, skew_positions, skew_size


def _solve(generator: Tensor) -> Tensor:
    """R − I of matrices (count, n, n) by factorisation.

    On a GPU this cannot be captured in a CUDA graph, because the libraries that factorise allocate memory; it is used
    there for float64, and for float32 without Triton.

    A solve costs no more than an inverse and is accurate for small and large Q alike. The system solved is
    (R − I)ᵀ = (I + Q)⁻¹(−2Q): since Q is skew, both sides are transposes of available matrices, which is the column
    order that LAPACK expects, so nothing is copied to be reordered. I + Q is never singular (its eigenvalues are
    1 ± iθ), so the check for that, which would make a GPU wait, is left out. Factorisation and solve are separate
    calls: torch.linalg.solve_ex measured up to three times slower on a CPU.
    """
    minus = -generator
    minus.diagonal(dim1=-2, dim2=-1).fill_(1)
    factor = torch.linalg.lu_factor_ex(minus.mT, check_errors=False)
    difference = torch.linalg.lu_solve(factor.LU, factor.pivots, (2 * generator).mT).mT
    # The error grows with the condition number of I − Q, which grows with ‖Q‖. One Newton–Schulz step
    # R ← ½ R (3 I − RᵀR) squares it.
    rotation = difference.clone(memory_format=torch.contiguous_format)
    rotation.diagonal(dim1=-2, dim2=-1).add_(1)
    defect = torch.baddbmm(difference, difference.mT, rotation)  # RᵀR − I
    return torch.baddbmm(difference, rotation, defect, alpha=-0.5)


_SMALL = range(2, 12)
"""Block sizes at which LAPACK's solves of many blocks take 1.5 to 3 times as long on a CPU as `_eliminate`."""


def _eliminate(generator: Tensor) -> Tensor:
    """R − I of many small matrices (count, n, n) by Gauss–Jordan elimination of all at once, in float64.

    No pivoting is needed: the symmetric part of I − Q is I, so every pivot is at least 1. That bounds the growth of
    rounding errors by about ‖Q‖², for which float64 has enough digits. The matrices lie along the last dimension, so
    that each operation runs over many of them.
    """
    n = generator.shape[-1]
    work = -generator.double().permute(1, 2, 0).contiguous()
    work.diagonal(dim1=0, dim2=1).fill_(1)
    eye = torch.eye(n, dtype=work.dtype)[..., None]
    for k in range(n):
        # A unit column replaces column k and becomes the inverse's by the same operations as the other columns.
        column = work[:, k].clone()
        work[:, k] = eye[k]
        row = work[k] / column[k]
        column[k] = 0
        work.addcmul_(column[:, None], row[None], value=-1)
        work[k] = row
    work.diagonal(dim1=0, dim2=1).sub_(1)  # in float64: in the dtype of the result a small rotation would be lost
    return work.permute(2, 0, 1).to(generator.dtype).mul_(2).contiguous()


class _CayleyOfEntries(torch.autograd.Function):
    """R − I from the free entries of Q, with a backward that needs only the result.

    dR = ½ (R + I) dQ (R + I), so ∂L/∂Q = 2 Hᵀ G Hᵀ with H = ½ (R + I) = I + ½ (R − I), of which the skew part counts.
    If torch rounds products to TF32, the gradient is rounded like those of all layers; R is not, where Triton runs.
    """

    @staticmethod
    def forward(entries: Tensor, n: int) -> Tensor:
        generator = skew_from_vector(entries, n).view(-1, n, n)
        kernels, difference = kernels_for(generator, "elimination_kernels"), None
        if kernels is not None and kernels.can_eliminate(generator):
            difference = kernels.cayley_by_elimination(generator)  # which a CUDA graph can capture
        if difference is None:
            difference = _eliminate(generator) if n in _SMALL and entries.device.type == "cpu" else _solve(generator)
        return difference.view(*entries.shape[:-1], n, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        *leading, n, _ = difference.shape
        turned, gradient = difference.reshape(-1, n, n).mT, gradient.reshape(-1, n, n)
        left = torch.baddbmm(gradient, turned, gradient, alpha=0.5)
        half = torch.baddbmm(left, left, turned, alpha=0.5).flatten(-2)
        upper, lower = skew_positions(n, half.device)
        found = 2 * (half.index_select(-1, upper) - half.index_select(-1, lower))
        return found.view(*leading, skew_size(n)), None


def neumann_difference(generator: Tensor, terms: int) -> Tensor:
    """The truncated Cayley–Neumann transform minus the identity, (I + Q)(I + Q + … + Qᵏ) − I.

    For ‖Q‖₂ < 1, each further term comes closer to the exact transform; beyond that the series diverges.

    Args:
        generator: Q, (..., n, n).
        terms: k ≥ 1, the highest power of the geometric series.

    Returns:
        (..., n, n).

    Raises:
        ValueError: k < 1.

    Source: Qiu et al., OFTv2 (2025), with the series written in one sign.
    """
    if terms < 1:
        raise ValueError(f"The Neumann series needs at least 1 term, but {terms} was given.")
    # Horner's rule on the series without the identity: (I+Q)(I+…+Qᵏ) − I = 2Q + 2Q² + … + 2Qᵏ + Qᵏ⁺¹.
    total = 2 * generator + generator @ generator
    for _ in range(terms - 1):
        total = 2 * generator + generator @ total
    return total


def bound_entries(entries: Tensor, bound: float) -> Tensor:
    """Scale Q down to Frobenius norm `bound` if it exceeds it; differentiable.

    Args:
        entries: (..., n(n − 1)/2), the free entries of Q; each matrix is bounded on its own.
        bound: the largest norm; if below 1, it also bounds ‖Q‖₂, so that the Neumann series converges.

    Returns:
        (..., n(n − 1)/2).
    """
    norm = 2**0.5 * torch.linalg.vector_norm(entries, dim=-1, keepdim=True)  # Q has each entry twice
    bounded: Tensor = entries * (bound / norm.clamp_min(bound))
    return bounded


def orthogonal_difference(entries: Tensor, n: int, neumann_terms: int | None = None) -> Tensor:
    """R − I from the free entries of the generator, by the exact transform or the truncated series.

    Args:
        entries: (..., n(n − 1)/2), the strict upper triangle of Q, row by row.
        n: size of R.
        neumann_terms: k of the series; None for the exact transform.

    Returns:
        R − I, (..., n, n), differentiable twice.

    Raises:
        ValueError: the last dimension of `entries` is not n(n − 1)/2, or k < 1.

    Examples:
        >>> rotation = torch.eye(3) + orthogonal_difference(torch.tensor([0.5, -1.0, 2.0]), 3)
        >>> torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-6)
        True

    Source: Cayley (1846).
    """
    if neumann_terms is not None:
        return neumann_difference(skew_from_vector(entries, n), neumann_terms)
    if is_plain():
        generator = skew_from_vector(entries, n)
        minus = torch.eye(n, dtype=entries.dtype, device=entries.device) - generator
        if not is_exported():
            solved: Tensor = torch.linalg.solve(minus, 2 * generator)
            return solved
        # The singular values of I − Q are at least 1, so from this start the iteration converges for every Q, and for
        # ‖Q‖ up to about 1,000 in 40 steps.
        start = minus.mT / minus.square().sum((-2, -1), keepdim=True)
        return 2 * generator @ inverse_by_products(minus, start, steps=40)
    result: Tensor = _CayleyOfEntries.apply(entries, n)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class CayleyMap:
    """How a rotation R is made of the trained entries of its generator Q.

    Args:
        n: size of R.
        neumann_terms: k of the series that replaces the exact transform; None for the exact one.
        generator_bound: largest Frobenius norm of Q; None for no bound.
        scaled: whether Q has the trained entries times `generator_scale(n)`, instead of the entries themselves.

    Examples:
        >>> CayleyMap(5, scaled=True).generator(torch.ones(10))[:2]
        tensor([0.2500, 0.2500])
    """

    n: int
    neumann_terms: int | None = None
    generator_bound: float | None = None
    scaled: bool = False

    @property
    def scale(self) -> float:
        """What the trained entries are multiplied by."""
        return generator_scale(self.n) if self.scaled else 1.0

    def generator(self, entries: Tensor) -> Tensor:
        """The free entries of Q, scaled and then bounded, from the trained ones, both (..., n(n − 1)/2)."""
        own = entries * self.scale if self.scaled else entries
        return own if self.generator_bound is None else bound_entries(own, self.generator_bound)

    def difference(self, entries: Tensor) -> Tensor:
        """R − I, (..., n, n), from the trained entries, (..., n(n − 1)/2); as `orthogonal_difference`."""
        return orthogonal_difference(self.generator(entries), self.n, self.neumann_terms)
