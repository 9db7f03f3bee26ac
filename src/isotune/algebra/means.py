"""Weighted means of the parameters of several operators, each on the set where it lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from isotune.algebra.cayley import bound_entries
from isotune.algebra.skew import skew_from_vector, skew_order, vector_from_skew

Mean = Callable[[Tensor, Tensor], Tensor]
"""mean(values, weights) -> their mean in float64, for values (k, …) and weights (k,) that need not sum to one."""

Means = Mapping[str, Mean]
"""Parameter name -> its mean."""

_LARGEST_TANGENT = 1e6


def linear_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ vᵢ: for free matrices and angles, with 0 where the operator is the identity."""
    mean: Tensor = torch.tensordot(weights.double(), values.double(), 1)
    return mean


def geometric_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Π vᵢ^wᵢ: for factors, with 1 where the operator is the identity.

    Raises:
        ValueError: a factor is not above 0, so that it has no power.
    """
    if not bool((values > 0).all()):
        raise ValueError("a magnitude or gain is not above 0, and such a factor has no weighted geometric mean")
    return linear_mean(values.double().log(), weights).exp()


@dataclass(frozen=True)
class RotationMean:
    """exp(Σ wᵢ log Rᵢ) of rotations given by the free entries of their Cayley generators, and back to such entries.

    The mean of the logarithms is the mean on the group in normal coordinates at the identity, which is the base model:
    a plane that each Rᵢ turns by θᵢ is turned by Σ wᵢ θᵢ, the order does not matter, and a change of coordinates common
    to all changes the mean likewise. A Cayley transform has no eigenvalue −1, so its principal logarithm exists:
    log R = 2 arctan Q by the eigenvalues, as R = (I + Q)(I − Q)⁻¹.

    Args:
        bound: Frobenius norm to which the operator scales generators down, as in `bound_entries`.

    Source: Moakher, Means and averaging in the group of rotations (2002), section 3; Arsigny, Fillard, Pennec and
    Ayache, Log-Euclidean metrics (2006), for means of logarithms at the identity.
    """

    bound: float | None = None

    def __call__(self, values: Tensor, weights: Tensor) -> Tensor:
        """(…, n(n − 1)/2) from (k, …, n(n − 1)/2).

        Raises:
            ValueError: a plane of the mean is turned by half a turn, which no Cayley transform does.
        """
        entries = values.double()
        if self.bound is not None:
            entries = bound_entries(entries, self.bound)
        logarithms = _of_eigenvalues(entries, lambda tangents: 2 * torch.arctan(tangents))
        tangents = _of_eigenvalues(linear_mean(logarithms, weights), lambda angles: torch.tan(angles / 2))
        if not bool((tangents.abs() < _LARGEST_TANGENT).all()):
            raise ValueError("a plane would be turned by half a turn, which no Cayley transform is; change the weights")
        return tangents


def generator_means(bound: float | None = None, *factors: str) -> Means:
    """The means of a rotation by `generator`, within a bound, and of parameters that scale inputs or outputs."""
    return {"generator": RotationMean(bound), **dict.fromkeys(factors, geometric_mean)}


def _of_eigenvalues(entries: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """f applied to the λ of the eigenvalues iλ of skew-symmetric matrices, by their free entries; f is odd."""
    values, vectors = torch.linalg.eigh(-1j * skew_from_vector(entries, skew_order(entries.shape[-1])))
    changed = (vectors * (1j * function(values))[..., None, :]) @ vectors.mH
    return vector_from_skew(changed.real)
