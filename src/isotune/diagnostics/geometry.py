"""Diagnostics of an adapter: how orthogonal, how far it turns, what it keeps of a weight's geometry, and its rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ROWS = 2048
"""Above so many rows, `angle_change` looks at this many evenly spaced ones: pairs grow with the square."""


class Change(NamedTuple):
    """How far a quantity with many values moved."""

    largest: float
    mean: float


def orthogonality_error(matrix: Tensor) -> float:
    """Largest absolute entry of RᵀR − I.

    Args:
        matrix: R, (n, n), or the blocks on its diagonal, (blocks, b, b).

    Returns:
        A number without a unit; about 1e-6 is what single precision leaves of an exactly orthogonal matrix.
    """
    wide = _wide(matrix)
    return float((wide.mT @ wide - torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)).abs().max())


def rotation_angles(matrix: Tensor) -> Tensor:
    """Angles by which an orthogonal matrix turns its invariant planes, largest first.

    Args:
        matrix: R, (n, n), orthogonal, or nearly so as with a truncated Neumann series; or the blocks on its diagonal,
            (blocks, b, b).

    Returns:
        (n,), float64, radians in [0, π]: the arguments of the eigenvalues, so that each plane appears twice.
    """
    eigenvalues: Tensor = torch.linalg.eigvals(_wide(matrix))
    return eigenvalues.angle().abs().flatten().sort(descending=True).values


def angle_change(before: Tensor, after: Tensor, *, max_rows: int = MAX_ROWS) -> Change:
    """How far the angles between the rows of a matrix moved, over all pairs of rows.

    Args:
        before: (out, n).
        after: (out, m); n and m may differ, as only the rows' inner products count.
        max_rows: above this many rows, that many evenly spaced ones stand for all; memory grows with its square.

    Returns:
        Largest and mean absolute change, radians. Rows that are zero before or after have no angle and are left out;
        with fewer than two rows left nothing moved.

    Raises:
        ValueError: the numbers of rows differ, or max_rows is below 2.
    """
    _check_rows(before, after)
    if max_rows < 2:
        raise ValueError(f"max_rows is {max_rows}; a pair of rows needs at least 2.")
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
    """At most `most` evenly spaced ones of `count` row numbers, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def norm_change(before: Tensor, after: Tensor) -> Change:
    """How far the norms of the rows of a matrix moved, relative to what they were.

    Args:
        before: (out, n).
        after: (out, m).

    Returns:
        Largest and mean of |‖after‖ − ‖before‖| / ‖before‖, without a unit. Rows that were zero are left out.

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
    """Share of the squared Frobenius norm of W that lies in a subspace, ‖W Vᵀ‖² / ‖W‖².

    Args:
        matrix: W, (out, in).
        basis: V, (r, in), orthonormal rows.

    Returns:
        From 0 to 1; 1 for a zero matrix, which has nothing outside.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    total = float(torch.linalg.vector_norm(matrix.to(wide), dtype=torch.float64)) ** 2
    inside = float(torch.linalg.vector_norm(matrix.to(wide) @ basis.to(wide).T, dtype=torch.float64)) ** 2
    return inside / total if total > 0 else 1.0


def factored_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """The nonzero singular values of ΔW = up · down, from the factors alone.

    Args:
        up: (out, r).
        down: (r, in).

    Returns:
        (min(out, r, in),), float64, descending. Their root sum of squares is ‖ΔW‖_F and the first is ‖ΔW‖₂.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 5.2: with up = Q₁R₁ and downᵀ = Q₂R₂ they are
    those of R₁R₂ᵀ, at most r × r.
    """
    left, right = torch.linalg.qr(_wide(up)).R, torch.linalg.qr(_wide(down).T).R
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def stable_rank(singular_values: Tensor) -> float:
    """‖ΔW‖_F² / ‖ΔW‖₂²: at least 1, at most the rank, and insensitive to small singular values.

    Args:
        singular_values: of ΔW, (k,), in any order.

    Returns:
        0 for a zero matrix.

    Source: Rudelson and Vershynin, Sampling from large matrices (2007), section 1.
    """
    squares = _wide(singular_values).square()
    largest = float(squares.max())
    return float(squares.sum()) / largest if largest > 0 else 0.0


def entropy_rank(singular_values: Tensor) -> float:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ² / Σ σⱼ²: over how many directions the energy of ΔW is spread.

    Args:
        singular_values: of ΔW, (k,), in any order.

    Returns:
        From 1 to the rank; 0 for a zero matrix.

    Source: after the effective rank of Roy and Vetterli (2007), who take pᵢ = σᵢ / Σ σⱼ. Here they are squared, so that
    the shares are of energy, as in `stable_rank` and `energy_captured`; the result is never above theirs.
    """
    squares = _wide(singular_values).square()
    total = float(squares.sum())
    return math.exp(float(torch.special.entr(squares / total).sum())) if total > 0 else 0.0


def _check_rows(before: Tensor, after: Tensor) -> None:
    if before.dim() != 2 or after.dim() != 2 or before.shape[0] != after.shape[0]:
        raise ValueError(
            f"The shapes are {tuple(before.shape)} and {tuple(after.shape)}; give two matrices with the same rows."
        )


def _wide(tensor: Tensor) -> Tensor:
    # Angles near zero vanish in single precision: arccos(1 − ε) is √(2ε). MPS has no float64.
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
