"""The Cayley transform R = (I + Q)(I − Q)⁻¹ of a skew-symmetric generator, exact and by a Neumann series.

Everything is returned as the difference R − I: near the identity, where training starts and mostly stays, the
difference keeps its own relative precision, while R itself would lose it to the leading one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.algebra.recording import is_exported
from isotune.algebra.skew import check_entries, skew_from_vector, skew_positions


def _solve(minus: Tensor, twice: Tensor) -> Tensor:
    """R − I from I − Q and 2Q, both contiguous; so is the result.

    A solve costs no more than an inverse and is accurate for small and large Q alike. It is (R − I)ᵀ = (I + Q)⁻¹(−2Q)
    that is solved: as Q is skew, both sides are the transposes of the arguments, which is the column order that LAPACK
    wants, so nothing is copied to be reordered. I + Q is never singular (its eigenvalues are 1 ± iθ), so the check for
    that, which would make a GPU wait, is left out. Factor and solve are called apart: torch.linalg.solve_ex measured up
    to three times slower on a CPU.
    """
    factor = torch.linalg.lu_factor_ex(minus.mT, check_errors=False)
    result: Tensor = torch.linalg.lu_solve(factor.LU, factor.pivots, twice.mT).mT
    return result


def _polish(difference: Tensor) -> Tensor:
    """R − I with R made orthogonal to rounding, by one Newton–Schulz step R ← ½ R (3 I − RᵀR).

    A solve leaves an error that grows with the condition of I − Q, which is that of Q; the step squares it.
    """
    if difference.ndim != 3:
        return _polish(difference.reshape(-1, *difference.shape[-2:])).view_as(difference)
    rotation = difference.clone(memory_format=torch.contiguous_format)
    rotation.diagonal(dim1=-2, dim2=-1).add_(1)
    defect = torch.baddbmm(difference, difference.mT, rotation)  # RᵀR − I
    return torch.baddbmm(difference, rotation, defect, alpha=-0.5)


_SMALL = range(2, 12)
"""Block sizes for which LAPACK's solves of many blocks take 1.5 to 3 times as long on a CPU as `_eliminate`."""


def _eliminate(generator: Tensor) -> Tensor:
    """R − I of many small matrices by Gauss–Jordan elimination of all at once, in float64.

    No pivots are searched: the symmetric part of I − Q is I, and so every pivot is at least 1. That bounds the growth
    of rounding errors by about ‖Q‖², which float64 has to spare. The matrices lie along the last dimension, so that
    each operation runs over many of them.
    """
    n = generator.shape[-1]
    work = -generator.double().reshape(-1, n, n).permute(1, 2, 0).contiguous()
    work.diagonal(dim1=0, dim2=1).fill_(1)
    eye = torch.eye(n, dtype=work.dtype)[..., None]
    for k in range(n):
        # The unit column in place of column k turns into that of the inverse by the same operations as all others.
        column = work[:, k].clone()
        work[:, k] = eye[k]
        row = work[k] / column[k]
        column[k] = 0
        work.addcmul_(column[:, None], row[None], value=-1)
        work[k] = row
    work.diagonal(dim1=0, dim2=1).sub_(1)  # in float64: in the dtype of the result a small rotation would be lost
    return work.permute(2, 0, 1).to(generator.dtype).mul_(2).reshape(generator.shape)


def _by_products(generator: Tensor) -> Tensor:
    """R − I by matrix products alone, for exports to formats that have no factorisation.

    Newton's iteration for (I − Q)⁻¹ from (I − Q)ᵀ / ‖I − Q‖²: the singular values of I − Q are 1 at least, so it
    converges for every skew Q, within 40 steps for ‖Q‖ up to about 1,000.
    """
    eye = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
    minus = eye - generator
    inverse = minus.mT / minus.square().sum((-2, -1), keepdim=True)
    for _ in range(40):
        inverse = inverse @ (2 * eye - minus @ inverse)
    return 2 * generator @ inverse


def _generator_gradient(difference: Tensor, gradient: Tensor) -> Tensor:
    """Half of ∂L/∂Q for dR = ½ (R + I) dQ (R + I): (½(R + I))ᵀ G (½(R + I))ᵀ, where ½(R + I) = I + ½(R − I)."""
    left = _plus_half_product(gradient, difference.mT, gradient)
    return _plus_half_product(left, left, difference.mT)


def _plus_half_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if base.ndim == 3:
        return torch.baddbmm(base, left, right, alpha=0.5)
    return base + 0.5 * (left @ right)


class _CayleyDifference(torch.autograd.Function):
    """R − I with the closed-form backward, which needs the result and nothing else."""

    @staticmethod
    def forward(generator: Tensor) -> Tensor:
        eye = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
        return _solve(eye - generator, 2 * generator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (difference,) = ctx.saved_tensors
        return 2 * _generator_gradient(difference, gradient)


class _CayleyOfEntries(torch.autograd.Function):
    """The same from the free entries of Q: Q itself is never formed, forward or backward."""

    @staticmethod
    def forward(entries: Tensor, n: int) -> Tensor:
        generator = skew_from_vector(entries, n)
        if n in _SMALL and entries.device.type == "cpu":
            return _eliminate(generator).contiguous()
        minus = -generator
        minus.diagonal(dim1=-2, dim2=-1).fill_(1)
        return _polish(_solve(minus, 2 * generator))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.n = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        half = _generator_gradient(difference, gradient).flatten(-2)
        upper, lower = skew_positions(ctx.n, half.device)
        return 2 * (half.index_select(-1, upper) - half.index_select(-1, lower)), None


def cayley_difference(generator: Tensor) -> Tensor:
    """Exact Cayley transform less the identity, R − I = 2Q(I − Q)⁻¹, orthogonal R for a skew Q.

    Args:
        generator: Q, (..., n, n), skew-symmetric; any leading dimensions are solved in one batch.

    Returns:
        R − I, (..., n, n), differentiable twice.

    Source: Cayley (1846); the backward formula is derived in the code.
    """
    result: Tensor = _CayleyDifference.apply(generator)  # type: ignore[no-untyped-call]
    return result


def cayley_of_entries(entries: Tensor, n: int) -> Tensor:
    """`cayley_difference` of the skew-symmetric matrix with these free entries, in fewer passes over memory.

    Args:
        entries: (..., n(n − 1)/2), the strict upper triangle of Q, row by row.
        n: size of R.

    Returns:
        R − I, (..., n, n), differentiable twice.

    Raises:
        ValueError: the last dimension of `entries` is not n(n − 1)/2.

    Example:
        >>> rotation = torch.eye(3) + cayley_of_entries(torch.tensor([0.5, -1.0, 2.0]), 3)
        >>> torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-6)
        True
    """
    check_entries(entries, n)
    result: Tensor = _CayleyOfEntries.apply(entries, n)  # type: ignore[no-untyped-call]
    return result


def neumann_difference(generator: Tensor, terms: int) -> Tensor:
    """Truncated Cayley–Neumann transform less the identity, (I + Q)(I + Q + … + Qᵏ) − I.

    Each further term is closer to the exact transform for ‖Q‖₂ < 1; beyond that the series diverges.

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
        raise ValueError(f"The Neumann series needs at least 1 term, got {terms}.")
    # Horner's rule on what is left when the identity is taken out: (I+Q)(I+…+Qᵏ) − I = 2Q + 2Q² + … + 2Qᵏ + Qᵏ⁺¹.
    total = 2 * generator + generator @ generator
    for _ in range(terms - 1):
        total = 2 * generator + generator @ total
    return total


def bound_generator(generator: Tensor, bound: float) -> Tensor:
    """Scale Q down to Frobenius norm `bound` where it exceeds it, with the gradient of doing so.

    Args:
        generator: Q, (..., n, n), each matrix bounded by itself.
        bound: the largest norm allowed, in (0, 1), which also bounds ‖Q‖₂ and so makes the Neumann series converge.

    Returns:
        (..., n, n).
    """
    norm = torch.linalg.matrix_norm(generator, keepdim=True)
    bounded: Tensor = generator * (bound / norm.clamp_min(bound))
    return bounded


def orthogonal_difference(
    entries: Tensor, n: int, neumann_terms: int | None = None, generator_bound: float | None = None
) -> Tensor:
    """R − I from the free entries of the generator, by the exact transform or the truncated series.

    Args:
        entries: (..., n(n − 1)/2), the strict upper triangle of Q.
        n: size of R.
        neumann_terms: k of the series; None for the exact transform.
        generator_bound: largest Frobenius norm of Q; None for no bound.

    Returns:
        (..., n, n).

    Raises:
        ValueError: as `cayley_of_entries`, or k < 1.
    """
    if is_exported():
        check_entries(entries, n)
        generator = skew_from_vector(entries, n)
        generator = generator if generator_bound is None else bound_generator(generator, generator_bound)
        return _by_products(generator) if neumann_terms is None else neumann_difference(generator, neumann_terms)
    if neumann_terms is None and generator_bound is None:
        check_entries(entries, n)
        result: Tensor = _CayleyOfEntries.apply(entries, n)  # type: ignore[no-untyped-call]
        return result
    generator = skew_from_vector(entries, n)
    if generator_bound is not None:
        generator = bound_generator(generator, generator_bound)
    return cayley_difference(generator) if neumann_terms is None else neumann_difference(generator, neumann_terms)
