"""Weighted means of the parameters of several operators, each on the set to which it belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isotune.algebra.cayley import CayleyMap, bound_entries
from isotune.algebra.householder import reflections
from isotune.algebra.procrustes import generator_of, reflections_of, rotation_of
from isotune.algebra.skew import skew_from_vector, skew_order, vector_from_skew


class Nearest(NamedTuple):
    """The value nearest to a mean that no value of a method's parameters gives."""

    value: Tensor
    missing: float
    """‖R − M‖_F of the mean R and what the value gives, M."""
    norm: float
    """‖R − I‖_F."""


Means = Mapping[str, Callable[..., Tensor | Nearest]]
"""Parameter name -> mean(values, weights, corrected=…), in float64, of values (k, …) with weights (k,) of any sum."""

_HALF_TURN = 1e-6
_HALF_TURN_TANGENT = 1e6
"""tan(θ/2) from which a mean is refused as half a turn; above the LARGEST_TANGENT of generators that are made."""
_CANCELLED = 1e-9
"""‖Σ wᵢ vᵢ‖ over Σ wᵢ ‖vᵢ‖ below which the sum is the rounding of what cancels."""


def linear_mean(values: Tensor, weights: Tensor, *, corrected: bool = False) -> Tensor:
    """Σ wᵢ vᵢ, for free matrices and angles, which are 0 if the operator is the identity.

    Args:
        values: (k, …).
        weights: (k,).
        corrected: multiply by c = Σ wᵢ ‖vᵢ‖ / ‖Σ wᵢ vᵢ‖, so that the mean is as long as the vᵢ are on average.

    Raises:
        ValueError: `corrected`, and a weight is below 0 or the vᵢ cancel, so that there is no length or no direction.

    Source: Yang, Shi and Liu, Orthogonal Model Merging (arXiv 2602.05943), for c, as its published code computes it
    with equal weights: merge_cayley_Q_list in merge/OrthoMerge_OFT_models.py of Sphere-AI-Lab/OrthoMerge.
    """
    mean: Tensor = torch.tensordot(weights.double(), values.double(), 1)
    if not corrected:
        return mean
    if bool((weights < 0).any()):
        raise ValueError("the magnitude of a mean cannot be corrected with weights below 0")
    length = weights.double() @ torch.linalg.vector_norm(values.double().flatten(1), dim=1)
    norm = torch.linalg.vector_norm(mean)
    if bool(norm <= _CANCELLED * length):
        if bool(length > 0):
            raise ValueError("the rotations cancel, so their mean has no direction whose magnitude could be corrected")
        return mean
    scaled: Tensor = mean * (length / norm)
    return scaled


def geometric_mean(values: Tensor, weights: Tensor, *, corrected: bool = False) -> Tensor:
    """Π vᵢ^wᵢ, for scales and gains, which are 1 if the operator is the identity; there is nothing to be corrected.

    Raises:
        ValueError: a value is not above 0, so it has no real power.
    """
    if not bool((values > 0).all()):
        raise ValueError("a scale or gain is not above 0, so it has no weighted geometric mean")
    return linear_mean(values.double().log(), weights).exp()


def rotation_mean(values: Tensor, weights: Tensor, bound: float | None = None, *, corrected: bool = False) -> Tensor:
    """exp(Σ wᵢ log Rᵢ) of rotations, which are given and returned as the free entries of their Cayley generators.

    The mean of the logarithms is the mean on the group in normal coordinates at the identity, which is the base model:
    a plane that each Rᵢ rotates by θᵢ is rotated by Σ wᵢ θᵢ, the order does not matter, and a change of coordinates
    common to all changes the mean accordingly. A Cayley transform has no eigenvalue −1, so its principal logarithm
    exists: log R = 2 arctan Q on the eigenvalues, since R = (I + Q)(I − Q)⁻¹.

    Args:
        values: (k, …, n(n − 1)/2).
        weights: (k,).
        bound: Frobenius norm to which the operator limits generators, as in `bound_entries`.
        corrected: OrthoMerge's mean instead: of the Cayley generators themselves, by `linear_mean` with its magnitude
            corrected over all dimensions but the first, which are one layer's blocks.

    Raises:
        ValueError: the mean rotates a plane by half a turn, which no Cayley transform can; or as in `linear_mean`.

    Source: Moakher, Means and averaging in the group of rotations (2002), section 3; Arsigny, Fillard, Pennec and
    Ayache, Log-Euclidean metrics (2006), for means of logarithms at the identity; for the corrected mean, as in
    `linear_mean`.
    """
    entries = values.double() if bound is None else bound_entries(values.double(), bound)
    if corrected:
        return linear_mean(entries, weights, corrected=True)
    logarithms = _of_eigenvalues(entries, lambda tangents: 2 * torch.arctan(tangents))
    tangents = _of_eigenvalues(linear_mean(logarithms, weights), lambda angles: torch.tan(angles / 2))
    if not bool((tangents.abs() < _HALF_TURN_TANGENT).all()):
        raise ValueError("the mean turns a plane by half a turn, which no Cayley transform can; change the weights")
    return tangents


def reflection_mean(values: Tensor, weights: Tensor, *, corrected: bool = False) -> Nearest:
    """The product of r reflections nearest to `rotation_mean` of several such products.

    Each turns at most r dimensions, so their mean is one of rotations of the at most k r dimensions of all directions
    together. It turns up to k r / 2 planes, of which r reflections reach the r/2 that are turned farthest.

    Args:
        values: directions, (k, r, n), r even.
        weights: (k,).
        corrected: as in `rotation_mean`, for the mean before it is approximated.

    Raises:
        ValueError: one of them turns a plane by half a turn, whose direction is open; or as in `rotation_mean`.
    """
    basis = torch.linalg.qr(values.double().flatten(0, 1).mT).Q
    left, right = reflections(values.double())
    rotations = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device) + (basis.mT @ left) @ (right @ basis)
    entries = generator_of(rotations)
    if float((rotation_of(entries) - rotations).norm()) > _HALF_TURN:
        raise ValueError("reflections at right angles turn a plane by half a turn, whose direction is open")
    found = reflections_of(rotation_mean(entries, weights, corrected=corrected), values.shape[1])
    return Nearest(found[0] @ basis.mT, *found[1:])


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
