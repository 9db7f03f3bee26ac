"""Measures of an adapter: its orthogonality, rotation angles and rank, and how far it preserves a weight's geometry."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isotune.subspace.lowrank import decomposed
from isotune.subspace.precision import doubled

MAX_ROWS = 2048
"""The most rows that `angle_change` compares; of more, it takes evenly spaced ones, since pairs grow quadratically."""


class Change(NamedTuple):
    """How far a quantity with many values changed."""

    largest: float
    mean: float


def orthogonality_error(matrix: Tensor) -> float:
    """The largest absolute entry of RᵀR − I.

    Args:
        matrix: R, (n, n), or the blocks on its diagonal, (blocks, b, b).

    Returns:
        A dimensionless number; about 1e-6 for an orthogonal matrix in single precision.
    """
    wide = _wide(matrix)
    return float((wide.mT @ wide - torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)).abs().max())


def rotation_angles(matrix: Tensor) -> Tensor:
    """The angles by which an orthogonal matrix rotates its invariant planes, largest first.

    Args:
        matrix: R, (n, n), orthogonal or, as with a truncated Neumann series, nearly so; or the blocks on its diagonal,
            (blocks, b, b).

    Returns:
        (n,), float64, radians in [0, π]: the arguments of the eigenvalues, so that each plane appears twice.
    """
    eigenvalues: Tensor = torch.linalg.eigvals(_wide(matrix))
    return eigenvalues.angle().abs().flatten().sort(descending=True).values


def angle_change(before: Tensor, after: Tensor, *, max_rows: int = MAX_ROWS) -> Change:
    """How far the angles between the rows of a matrix changed, over all pairs of rows.

    Args:
        before: (out, n).
        after: (out, m); n and m may differ, since only the rows' inner products matter.
        max_rows: the most rows to compare; of more, that many evenly spaced ones. Memory grows with its square.

    Returns:
        Largest and mean absolute change, radians. Rows that are zero before or after have no angle and are left out;
        with fewer than two rows left, both are 0.

    Raises:
        ValueError: the numbers of rows differ, or max_rows is below 2.
    """
    _check_rows(before, after)
    if max_rows < 2:
        raise ValueError(f"max_rows={max_rows} is not allowed; it must be at least 2, since angles need pairs of rows.")
    if before.shape[0] > max_rows:
        chosen = spaced(before.shape[0], max_rows).to(before.device)
        before, after = before[chosen], after[chosen]
    first, second = _wide(before), _wide(after)
    nonzero = first.any(1) & second.any(1)
    first, second = first[nonzero], second[nonzero]
    count = first.shape[0]
    if count < 2:
        return Change(0.0, 0.0)
    # The diagonal is zero in both, so it adds nothing to the sum over the count (count - 1) ordered pairs.
    moved = (pairwise_angles(second) - pairwise_angles(first)).abs_()
    return Change(float(moved.max()), float(moved.sum()) / (count * (count - 1)))


def pairwise_angles(matrix: Tensor) -> Tensor:
    """The angle between every two rows of a matrix.

    Args:
        matrix: (k, n), no row zero.

    Returns:
        (k, k), float64, radians in [0, π]; zero on the diagonal.
    """
    rows = _wide(matrix)
    units = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    angles = torch.arccos((units @ units.T).clamp_(-1.0, 1.0))
    return angles.fill_diagonal_(0.0)


def spaced(count: int, most: int) -> Tensor:
    """At most `most` evenly spaced indices of `count` rows, including the first and the last."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def norm_change(before: Tensor, after: Tensor) -> Change:
    """How far the norms of the rows of a matrix changed, relative to the norms before.

    Args:
        before: (out, n).
        after: (out, m).

    Returns:
        Largest and mean of |‖after‖ − ‖before‖| / ‖before‖, dimensionless. Rows that were zero are left out.

    Raises:
        ValueError: the numbers of rows differ.
    """
    _check_rows(before, after)
    old, new = (torch.linalg.vector_norm(_wide(m), dim=1) for m in (before, after))
    kept = old > 0
    if not bool(kept.any()):
        return Change(0.0, 0.0)
    moved = ((new - old).abs() / old)[kept]
    return Change(float(moved.max()), float(moved.mean()))


def energy_captured(matrix: Tensor, basis: Tensor) -> float:
    """The share of W's squared Frobenius norm that lies in a subspace, ‖W Vᵀ‖² / ‖W‖².

    Args:
        matrix: W, (out, in).
        basis: V, (r, in), orthonormal rows.

    Returns:
        From 0 to 1; 1 for a zero matrix, which has nothing outside the subspace.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    total = float(torch.linalg.vector_norm(matrix.to(wide), dtype=torch.float64)) ** 2
    inside = float(torch.linalg.vector_norm(matrix.to(wide) @ basis.to(wide).T, dtype=torch.float64)) ** 2
    return inside / total if total > 0 else 1.0


def interference(change: Tensor, left: Tensor, right: Tensor) -> float:
    """ρ_k: the share of ‖ΔW‖_F² that lies in the span of the k strongest singular vectors of W, ‖Uᵀ ΔW Vᵀ‖² / ‖ΔW‖².

    Args:
        change: ΔW, (out, in).
        left: U, (out, k), orthonormal columns.
        right: V, (k, in), orthonormal rows.

    Returns:
        From 0, where ΔW leaves the matrix in these directions alone, to 1, where it changes nothing else; 0 for no
        change.

    Source: Xiong and Xie, OPLoRA (AAAI 2026, arXiv 2510.13003), whose abstract calls ρ_k the alignment of an update
    with the dominant directions. Its formula is not public beyond that; this one is ours.
    """
    wide = _wide(change)
    total = float(torch.linalg.vector_norm(wide)) ** 2
    inside = float(torch.linalg.vector_norm(_wide(left).T @ wide @ _wide(right).T)) ** 2
    return inside / total if total > 0 else 0.0


def factored_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """The nonzero singular values of ΔW = up · down, from the factors alone.

    Args:
        up: (out, r).
        down: (r, in).

    Returns:
        (min(out, r, in),), float64, descending. Their root sum of squares is ‖ΔW‖_F, and the first is ‖ΔW‖₂.
    """
    return decomposed(up, down)[1]


def stable_rank(singular_values: Tensor) -> float:
    """‖ΔW‖_F² / ‖ΔW‖₂²: at least 1, at most the rank, and insensitive to small singular values.

    Args:
        singular_values: singular values of ΔW, (k,), in any order.

    Returns:
        The stable rank; 0 for a zero matrix.

    Source: Rudelson and Vershynin, Sampling from large matrices (2007), section 1.
    """
    squares = _wide(singular_values).square()
    largest = float(squares.max())
    return float(squares.sum()) / largest if largest > 0 else 0.0


def entropy_rank(singular_values: Tensor) -> float:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ² / Σ σⱼ²: the number of directions over which the energy of ΔW is spread.

    Args:
        singular_values: singular values of ΔW, (k,), in any order.

    Returns:
        From 1 to the rank; 0 for a zero matrix.

    Source: after the effective rank of Roy and Vetterli (2007), who take pᵢ = σᵢ / Σ σⱼ. The squares here make them
    shares of energy, as in `stable_rank` and `energy_captured`; the result is never above theirs.
    """
    squares = _wide(singular_values).square()
    total = float(squares.sum())
    return math.exp(float(torch.special.entr(squares / total).sum())) if total > 0 else 0.0


def _check_rows(before: Tensor, after: Tensor) -> None:
    if before.dim() != 2 or after.dim() != 2 or before.shape[0] != after.shape[0]:
        raise ValueError(
            f"The shapes are {tuple(before.shape)} and {tuple(after.shape)}; give two matrices with equally many rows."
        )


def _wide(tensor: Tensor) -> Tensor:
    # Angles near zero vanish in single precision: arccos(1 − ε) is √(2ε).
    return doubled(tensor.detach())
