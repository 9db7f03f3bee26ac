"""Requests to the solvers of principal subspaces, and their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """The top-r, or r other, right singular vectors of a weight W (out, in), and how they were found."""

    basis: Tensor
    """(r, in), orthonormal rows ordered by descending singular value, on the weight's device; float64 for a float64
    weight, otherwise float32."""
    singular_values: Tensor
    """(r,), descending, same dtype and device as the basis."""
    energy: float
    """Sum of the captured squared singular values over the squared Frobenius norm of W; 1.0 for a zero weight."""
    solver: str
    """"full" or "lowrank": the solver that was used in the end."""
    iterations: int
    """Products with WᵀW (or WWᵀ) that "lowrank" used, even if it then fell back to "full"; 0 for "full" alone."""


@dataclass(frozen=True)
class SubspaceRequest:
    """One weight for `principal_subspaces`: a tensor, or a function that makes it when its turn comes."""

    weight: Tensor | Callable[[], Tensor]
    """(out, in), or a function that returns it, so that only one dequantised copy exists at a time."""
    rank: int
    name: str = "weight"
    """Begins every error message about this request."""
    places: tuple[int, ...] | None = None
    """The places of r singular triplets in the order of descending singular values; None for the first r."""
