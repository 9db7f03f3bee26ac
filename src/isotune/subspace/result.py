"""What is asked of the solvers of principal subspaces, and what they find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """The top-r right singular vectors of a weight W (out, in), and how they were found."""

    basis: Tensor
    """(r, in), orthonormal rows by descending singular value, on the weight's device; float64 for a float64 weight,
    otherwise float32."""
    singular_values: Tensor
    """(r,), descending, same dtype and device as the basis."""
    energy: float
    """Sum of the captured squared singular values over the squared Frobenius norm of W; 1.0 for a zero weight."""
    solver: str
    """"full" or "lowrank": what was really used."""
    iterations: int
    """Products with WᵀW (or WWᵀ) that "lowrank" spent, also where it then fell back; 0 for "full"."""


@dataclass(frozen=True)
class SubspaceRequest:
    """One weight of `principal_subspaces`: the tensor, or a function that makes it when its turn comes."""

    weight: Tensor | Callable[[], Tensor]
    """(out, in), or a zero-argument callable that returns it, so that one dequantised copy lives at a time."""
    rank: int
    name: str = "weight"
    """Begins every error message about this request."""
