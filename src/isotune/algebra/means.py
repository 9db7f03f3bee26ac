"""Weighted means of the parameters of several operators, each on the set where it lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from isotune.algebra.cayley import bound_entries
from isotune.algebra.skew import skew_from_vector, skew_order, vector_from_skew

Means = Mapping[str, Callable[[Tensor, Tensor], Tensor]]
"""Parameter name -> mean(values, weights), in float64, of values (k, …) by weights (k,) that need not sum to one."""

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


def rotation_mean(values: Tensor, weights: Tensor, bound: float | None = None) -> Tensor:
    """exp(Σ wᵢ log Rᵢ) of rotations given by the free entries of their Cayley generators, and back to such entries.

    The mean of the logarithms is the mean on the group in normal coordinates at the identity, which is the base model:
    a plane that each Rᵢ turns by θᵢ is turned by Σ wᵢ θᵢ, the order does not matter, and a change of coordinates common
    to all changes the mean likewise. A Cayley transform has no eigenvalue −1, so its principal logarithm exists:
    log R = 2 arctan Q by the eigenvalues, as R = (I + Q)(I − Q)⁻¹.

    Args:
        values: (k, …, n(n − 1)/2).
        weights: (k,).
        bound: Frobenius norm to which the operator scales generators down, as in `bound_entries`.

    Raises:
        ValueError: a plane of the mean is turned by half a turn, which no Cayley transform does.

    Source: Moakher, Means and averaging in the group of rotations (2002), section 3; Arsigny, Fillard, Pennec and
    Ayache, Log-Euclidean metrics (2006), for means of logarithms at the identity.
    """
    entries = values.double() if bound is None else bound_entries(values.double(), bound)
    logarithms = _of_eigenvalues(entries, lambda tangents: 2 * torch.arctan(tangents))
    tangents = _of_eigenvalues(linear_mean(logarithms, weights), lambda angles: torch.tan(angles / 2))
    if not bool((tangents.abs() < _LARGEST_TANGENT).all()):
        raise ValueError("a plane would be turned by half a turn, which no Cayley transform is; change the weights")
    return tangents


def generator_means(bound: float | None = None, *factors: str) -> Means:
    """The means of a rotation by `generator`, within a bound, and of parameters that scale inputs or outputs."""
    return {"generator": partial(rotation_mean, bound=bound), **dict.fromkeys(factors, geometric_mean)}


def _of_eigenvalues(entries: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """f applied to the λ of the eigenvalues iλ of skew-symmetric matrices, by their free entries; f is odd."""
    values, vectors = torch.linalg.eigh(-1j * skew_from_vector(entries, skew_order(entries.shape[-1])))
    changed = (vectors * (1j * function(values))[..., None, :]) @ vectors.mH
    return vector_from_skew(changed.real)
