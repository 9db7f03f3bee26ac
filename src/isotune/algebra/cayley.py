"""The Cayley transform R = (I + Q)(I − Q)⁻¹ of a skew-symmetric generator, exact and by a Neumann series.

Everything is returned as the difference R − I: near the identity, where training starts and mostly stays, the
difference keeps its own relative precision, while R itself would lose it to the leading one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.algebra.skew import skew_from_vector


class _CayleyDifference(torch.autograd.Function):
    """R − I with the closed-form backward, which needs the result and nothing else."""

    @staticmethod
    def forward(generator: Tensor) -> Tensor:
        eye = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
        # R − I = 2 (I − Q)⁻¹ Q. A solve costs no more than an inverse and is accurate for small and for large Q alike.
        # I − Q of a skew Q is never singular (its eigenvalues are 1 ± iθ), so the check for that, which would make a
        # GPU wait, is left out. Factor and solve are called apart: together they measured three times slower on a CPU.
        factor = torch.linalg.lu_factor_ex(eye - generator, check_errors=False)
        result: Tensor = torch.linalg.lu_solve(factor.LU, factor.pivots, 2 * generator)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (difference,) = ctx.saved_tensors
        # dR = ½ (R + I) dQ (R + I), hence ∂L/∂Q = ½ (R + I)ᵀ G (R + I)ᵀ, and (R + I)/2 = I + (R − I)/2.
        half_sum = torch.eye(difference.shape[-1], dtype=difference.dtype, device=difference.device) + difference / 2
        result: Tensor = 2 * (half_sum.mT @ gradient @ half_sum.mT)
        return result


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
    """
    generator = skew_from_vector(entries, n)
    if generator_bound is not None:
        generator = bound_generator(generator, generator_bound)
    return cayley_difference(generator) if neumann_terms is None else neumann_difference(generator, neumann_terms)
