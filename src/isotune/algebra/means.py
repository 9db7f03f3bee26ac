"""Weighted means of the parameters of several operators, each on the set to which it belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isotune.algebra.cayley import CayleyMap, bound_entries
from isotune.algebra.skew import skew_from_vector, skew_order, vector_from_skew

Means = Mapping[str, Callable[[Tensor, Tensor], Tensor]]
"""Parameter name -> mean(values, weights), in float64, of values (k, …) with weights (k,) of any sum."""

_LARGEST_TANGENT = 1e6


def linear_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ vᵢ, for free matrices and angles, which are 0 if the operator is the identity."""
    mean: Tensor = torch.tensordot(weights.double(), values.double(), 1)
    return mean


def geometric_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Π vᵢ^wᵢ, for scales and gains, which are 1 if the operator is the identity.

    Raises:
        ValueError: a value is not above 0, so it has no real power.
    """
    if not bool((values > 0).all()):
        raise ValueError("a scale or gain is not above 0, so it has no weighted geometric mean")
    return linear_mean(values.double().log(), weights).exp()


def rotation_mean(values: Tensor, weights: Tensor, bound: float | None = None) -> Tensor:
    """exp(Σ wᵢ log Rᵢ) of rotations, which are given and returned as the free entries of their Cayley generators.

    The mean of the logarithms is the mean on the group in normal coordinates at the identity, which is the base model:
    a plane that each Rᵢ rotates by θᵢ is rotated by Σ wᵢ θᵢ, the order does not matter, and a change of coordinates
    common to all changes the mean accordingly. A Cayley transform has no eigenvalue −1, so its principal logarithm
    exists: log R = 2 arctan Q on the eigenvalues, since R = (I + Q)(I − Q)⁻¹.

    Args:
        values: (k, …, n(n − 1)/2).
        weights: (k,).
        bound: Frobenius norm to which the operator limits generators, as in `bound_entries`.

    Raises:
        ValueError: the mean rotates a plane by half a turn, which no Cayley transform can.

    Source: Moakher, Means and averaging in the group of rotations (2002), section 3; Arsigny, Fillard, Pennec and
    Ayache, Log-Euclidean metrics (2006), for means of logarithms at the identity.
    """
    entries = values.double() if bound is None else bound_entries(values.double(), bound)
    logarithms = _of_eigenvalues(entries, lambda tangents: 2 * torch.arctan(tangents))
    tangents = _of_eigenvalues(linear_mean(logarithms, weights), lambda angles: torch.tan(angles / 2))
    if not bool((tangents.abs() < _LARGEST_TANGENT).all()):
        raise ValueError("the mean turns a plane by half a turn, which no Cayley transform can; change the weights")
    return tangents


def generator_means(cayley: CayleyMap, *factors: str) -> Means:
    """Means for a rotation given by `generator`, and for parameters that scale inputs or outputs.

    Args:
        cayley: how the rotation is made of `generator`.
        factors: names of the parameters that scale.
    """
    return {"generator": partial(_mean_of_generators, cayley), **dict.fromkeys(factors, geometric_mean)}


def _mean_of_generators(cayley: CayleyMap, values: Tensor, weights: Tensor, **options: Any) -> Tensor:
    own = rotation_mean(values.double() * cayley.scale, weights, cayley.generator_bound, **options)
    return own / cayley.scale


def _of_eigenvalues(entries: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an odd f to the λ of the eigenvalues iλ of skew-symmetric matrices, by their free entries."""
    values, vectors = torch.linalg.eigh(-1j * skew_from_vector(entries, skew_order(entries.shape[-1])))
    changed = (vectors * (1j * function(values))[..., None, :]) @ vectors.mH
    return vector_from_skew(changed.real)
