"""Pinning: a small sketch of a basis, from which the same basis is found again on the same or a similar weight.

Singular vectors are fixed only up to signs and rotations among near-equal singular values, so a basis cannot be
recomputed; and storing it whole is what an adapter is meant to avoid. Its sketch S = V Ω with a fixed Gaussian Ω holds
slightly more numbers than the rotation to any other basis of the same span has, and the surplus tells how much of V
that span does not hold.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from isotune.subspace.precision import doubled

CANDIDATE_TOLERANCE = 1e-4
"""How closely the subspaces of pinned adapters are solved: what remains is the error of an update after loading."""

MAX_RESIDUAL = 0.03
"""The residual of `recover` above which the base is not the one that the basis was pinned on.

Measured at ranks 32 to 128 on all 36 linear layers of all-MiniLM-L6-v2 and 42 of Gemma 3 270M, each layer by itself:
the same weights under another driver or solver, at most 8e-6; rounded to bfloat16, at most 4e-3 (the update off by at
most 1e-2); to 8 bits, at most 1.5e-2 (4e-2); to 4 bits in blocks of 64, at least 4.7e-2 (0.2 to 0.5); another layer or
a random weight, at least 0.67.
"""


def pin_width(rank: int, in_features: int) -> int:
    """Say how many columns p the pin of a basis (rank, in_features) has.

    Part of the file format: r + max(8, r // 4), and never more than in_features, where the pin is as good as V itself.
    """
    return min(in_features, rank + max(8, rank // 4))


def candidate_rank(rank: int, in_features: int, out_features: int) -> int:
    """Say how many right singular vectors k of the base `recover` should be given.

    More than r, so that a group of near-equal singular values that straddles the cut at r lies inside; fewer than p, so
    that what is left of p can measure the residual.
    """
    return min(in_features, out_features, rank + max(4, rank // 8))


def pin(basis: Tensor, *, seed: int = 0, oversampling: int | None = None) -> Tensor:
    """Sketch a basis V with orthonormal rows as S = V Ω.

    Ω holds the standard normal numbers of numpy's `RandomState(seed)`, whose stream is frozen.

    Args:
        basis: V, (r, in), r ≤ in.
        seed: of Ω, (in, p).
        oversampling: p − r at most; None for that of `pin_width`.

    Returns:
        S, (r, p), float32, on the device of the basis.

    Raises:
        ValueError: the basis is not a finite matrix with r ≤ in, or oversampling is negative.

    Examples:
        >>> import torch
        >>> basis = torch.eye(3, 40)
        >>> sketch = pin(basis)
        >>> sketch.shape
        torch.Size([3, 11])
        >>> found, residual = recover(sketch, basis.flip(0) * -1)  # the same span, other vectors
        >>> torch.allclose(found, basis, atol=1e-5), residual < 1e-5
        (True, True)
    """
    _check_matrix(basis, "the basis", "(r, in) with r ≤ in")
    rank, width = basis.shape
    if oversampling is not None and oversampling < 0:
        raise ValueError(f"oversampling is {oversampling}; give 0 or more columns beyond the rank, or None")
    columns = pin_width(rank, width) if oversampling is None else min(width, rank + oversampling)
    return _sketch(doubled(basis.detach()), columns, seed).float().to(basis.device)


def recover(pin: Tensor, candidates: Tensor, *, seed: int = 0) -> tuple[Tensor, float]:
    """Find the basis V that a pin was made of in the span of the base's own singular vectors V'.

    V' Ω has full rank, so S = T (V' Ω) has one least-squares solution T, and V is the orthonormal polar factor of T V':
    the nearest basis in the span. The part of V outside the span has a Gaussian sketch independent of V' Ω, which
    leaves E‖S − T V' Ω‖² = (p − k) ‖V⊥‖². A T whose rows are not orthonormal counts as well, in the same units; it is
    all there is to measure with k ≥ p. Where p = k = in, the pin holds all of V, and every base passes.

    Args:
        pin: S, (r, p), from the function `pin`.
        candidates: V', (k, in), the base's leading right singular vectors, orthonormal rows, k from `candidate_rank`.
        seed: as for the function `pin`.

    Returns:
        V, (r, in), orthonormal rows, in the dtype and on the device of the candidates; and the residual, an estimate of
        the root mean square over V's rows of the sine of the angle between the pinned V and the span of V', from 0
        (rounding: about 1e-5) to about 1 (another base). Above `MAX_RESIDUAL` V is not to be trusted; the caller
        decides.

    Raises:
        ValueError: shapes that do not fit (r ≤ k ≤ in, r ≤ p ≤ in), or numbers that are not finite.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 9.4.3, for the polar factor.
    """
    _check_matrix(pin, "the pin", "(r, p) with r ≤ p")
    _check_matrix(candidates, "the candidates", "(k, in) with k ≤ in")
    (rank, columns), (count, width) = pin.shape, candidates.shape
    if not rank <= count or columns > width:
        raise ValueError(
            f"a pin of shape {tuple(pin.shape)} does not fit candidates of shape {tuple(candidates.shape)}: it needs "
            f"at least {rank} candidates, of length {columns} or more; was it pinned on a layer of another size?"
        )
    span = doubled(candidates.detach())
    sketch = _sketch(span, columns, seed).cpu()
    stored = pin.detach().cpu().double()
    mixing = torch.linalg.lstsq(sketch.T, stored.T, driver="gelsd").solution.T
    left, _, right = torch.linalg.svd(mixing, full_matrices=False)
    basis = (left @ right).to(span) @ span
    return basis.to(candidates), _residual(stored, sketch, mixing)


def _sketch(basis: Tensor, columns: int, seed: int) -> Tensor:
    """V Ω in float64, computed where V is: a CPU that feeds a GPU takes longer for it than the solver for V."""
    return basis @ gaussian(basis.shape[1], columns, seed).to(basis.device)


def _residual(stored: Tensor, sketch: Tensor, mixing: Tensor) -> float:
    (rank, columns), count = stored.shape, sketch.shape[0]
    defect = torch.linalg.matrix_norm(mixing @ mixing.T - torch.eye(rank, dtype=mixing.dtype)) / rank**0.5
    surplus = columns - count
    if surplus <= 0:
        return float(defect)
    outside = torch.linalg.matrix_norm(stored - mixing @ sketch) / (surplus * rank) ** 0.5
    # A part of size ε outside the span reaches T through the least squares as noise of ε √c a row, so that T Tᵀ is off
    # by about ε √(2 c) + ε² c. Solved for ε, the defect is in the same units, and no louder unless T itself is wrong.
    c = count / max(surplus - 1, 1)
    within = (2.0 * defect / ((2.0 * c) ** 0.5 + (2.0 * c + 4.0 * c * defect).sqrt())).clamp_max(1.0)
    return float(torch.maximum(outside, within))


def _check_matrix(matrix: Tensor, what: str, shape: str) -> None:
    if matrix.dim() != 2 or not 0 < matrix.shape[0] <= matrix.shape[1]:
        raise ValueError(f"{what} has shape {tuple(matrix.shape)}; give a matrix {shape}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{what} holds NaN or infinity; the file or the base it comes from is damaged")


@lru_cache(maxsize=8)
def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal numbers, float64, the same on every version and device: numpy's policy freezes this stream."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((rows, columns)))
