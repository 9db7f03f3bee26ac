"""How far Ritz vectors may still be from the true ones, and how hard a filter may amplify them.

Throughout, `ritz` are the Ritz values θ of WᵀW in a block, descending, and `residuals` the corresponding norms
‖WᵀW v − θ v‖, both (block,); the first `rank` of them are wanted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_DEGREE = 12
_MAX_AMPLIFICATION = 1e6


def angle_bound(ritz: Tensor, residuals: Tensor, rank: int) -> float:
    """Bound the sine of the largest angle between the span of the first `rank` Ritz vectors and the true one.

    The smaller of two bounds. The first is that of Davis and Kahan, vector by vector: each residual divided by its own
    distance to the rest of the spectrum, which begins at the next Ritz value plus that value's residual. The second is
    an expansion to second order in the residuals, which uses that Rayleigh-Ritz has already separated the vectors
    within the block: what is missing lies beyond the block, far below, or returns from there into the block.

    A bound of 1 says nothing.

    Source: Davis and Kahan (1970), The rotation of eigenvectors by a perturbation III; Stewart (1973), Error and
    perturbation bounds for subspaces.
    """
    bounds = [1.0]
    gaps = ritz[:rank] - (ritz[rank] + residuals[rank])
    if float(gaps[-1]) > 0.0:
        bounds.append(float(torch.linalg.vector_norm(residuals[:rank] / gaps)))
    beyond = ritz[:rank] - (ritz[-1] + residuals[-1])
    within = ritz[:rank, None] - ritz[None, rank:]
    if float(beyond[-1]) > 0.0 and float(within[-1, 0]) > 0.0:
        outside = residuals[:rank] / beyond
        returned = outside[:, None] * residuals[None, rank:] / within
        bounds.append(math.hypot(float(torch.linalg.vector_norm(outside)), float(torch.linalg.vector_norm(returned))))
    return min(bounds)


def relative_residual(ritz: Tensor, residuals: Tensor, rank: int) -> float:
    """‖WᵀW v − θ v‖ / θ over the wanted Ritz vectors together, in the Euclidean norm."""
    # Relative to each value, since rounding leaves larger residuals on strong directions than on weak ones.
    floor = torch.finfo(torch.float32).eps * ritz[0]
    return float(torch.linalg.vector_norm(residuals[:rank] / (ritz[:rank] + floor)))


def missing_energy(ritz: Tensor, residuals: Tensor, rank: int) -> float:
    """Bound the share of the best subspace's energy that the wanted Ritz vectors miss.

    Weyl's bound on each eigenvalue, or the quadratic bound if the end of the block is far enough below.
    """
    wanted, errors = ritz[:rank], residuals[:rank]
    far = (wanted - ritz[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.minimum(errors, errors.square() / far).sum() / wanted.sum())


def filter_degree(strongest: float, weakest: float) -> int:
    """The highest degree whose filter leaves the weakest wanted direction above the rounding of the strongest.

    T_m(2x − 1) = cosh(m arccosh(2x − 1)).

    Args:
        strongest: the largest eigenvalue of WᵀW, divided by the cut.
        weakest: the last wanted eigenvalue, divided by the cut.
    """
    spread = math.acosh(max(2.0 * strongest - 1.0, 1.0)) - math.acosh(max(2.0 * weakest - 1.0, 1.0))
    return max(1, min(_MAX_DEGREE, int(math.log(_MAX_AMPLIFICATION) / max(spread, 1e-9))))
