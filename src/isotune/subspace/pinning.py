"""Pinning: a small sketch of a basis, from which the same basis is found again on the same or a similar weight.

Singular vectors are determined only up to signs and rotations among near-equal singular values, so a basis cannot be
recomputed, and storing it whole is what an adapter is meant to avoid. Its sketch S = V Ω with a fixed Gaussian Ω holds
slightly more numbers than a rotation to any other basis of the same span, and the surplus shows how much of V lies
outside that span.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from isotune.subspace.precision import doubled

CANDIDATE_TOLERANCE = 1e-4
"""How precisely the subspaces of pinned adapters are solved, which limits the error of an update after loading."""

MAX_RESIDUAL = 0.03
"""The residual of `recover` above which the base is not the one the basis was pinned on.

Measured at ranks 32 to 128 on all 36 linear layers of all-MiniLM-L6-v2 and 42 of Gemma 3 270M, each layer on its own:
the same weights under another driver or solver, at most 8e-6; rounded to bfloat16, at most 4e-3 (the update off by at
most 1e-2); to 8 bits, at most 1.5e-2 (4e-2); to 4 bits in blocks of 64, at least 4.7e-2 (0.2 to 0.5); another layer or
a random weight, at least 0.67.
"""


def pin_width(rank: int, in_features: int) -> int:
    """The number of columns p of the pin of a basis (rank, in_features).

    This is part of the file format: r + max(8, r // 4), and at most in_features, where the pin is as good as V itself.
    """
    return min(in_features, rank + max(8, rank // 4))


def candidate_rank(rank: int, in_features: int, out_features: int) -> int:
    """The number k of the base's right singular vectors to give to `recover`.

    It is more than r, so that a group of near-equal singular values across the cut at r is included, and less than p,
    so that the rest of p can measure the residual.
    """
    return min(in_features, out_features, rank + max(4, rank // 8))


def pin(basis: Tensor, *, seed: int = 0) -> Tensor:
    """Sketch a basis V with orthonormal rows as S = V Ω.

    Ω holds standard normal numbers from numpy's `RandomState(seed)`, whose stream is frozen.

    Args:
        basis: V, (r, in), r ≤ in.
        seed: seed of Ω, (in, p).

    Returns:
        S, (r, p), float32, on the device of the basis.

    Raises:
        ValueError: the basis is not a finite matrix with r ≤ in.

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
    return _sketch(doubled(basis.detach()), pin_width(*basis.shape), seed).float().to(basis.device)


def recover(pin: Tensor, candidates: Tensor, *, seed: int = 0) -> tuple[Tensor, float]:
    """Find the basis V from which a pin was made in the span of the base's own singular vectors V'.

    V' Ω has full rank, so S = T (V' Ω) has one least-squares solution T, and V is the orthonormal polar factor of T V':
    the nearest basis in the span. The part of V outside the span has a Gaussian sketch independent of V' Ω, so that
    E‖S − T V' Ω‖² = (p − k) ‖V⊥‖². The deviation of T's rows from orthonormality also counts, in the same units; for
    k ≥ p nothing else can be measured. If p = k = in, the pin determines V completely, and every base passes.

    Args:
        pin: S, (r, p), from the function `pin`.
        candidates: V', (k, in), the base's leading right singular vectors, orthonormal rows, k from `candidate_rank`.
        seed: as in the function `pin`.

    Returns:
        V, (r, in), orthonormal rows, in the dtype and on the device of the candidates; and the residual, an estimate of
        the root mean square over V's rows of the sine of the angle between the pinned V and the span of V', from 0
        (rounding: about 1e-5) to about 1 (another base). Above `MAX_RESIDUAL`, V should not be trusted; the caller
        decides.

    Raises:
        ValueError: the shapes do not fit (r ≤ k ≤ in, r ≤ p ≤ in), or the values are not finite.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 9.4.3, for the polar factor.
    """
    _check_matrix(pin, "the pin", "(r, p) with r ≤ p")
    _check_matrix(candidates, "the candidates", "(k, in) with k ≤ in")
    (rank, columns), (count, width) = pin.shape, candidates.shape
    if not rank <= count or columns > width:
        raise ValueError(
            f"A pin of shape {tuple(pin.shape)} does not fit candidates of shape {tuple(candidates.shape)}: it needs "
            f"at least {rank} candidates of length {columns} or more. Was it pinned on a layer of another size?"
        )
    span = doubled(candidates.detach())
    sketch = _sketch(span, columns, seed).cpu()
    stored = pin.detach().cpu().double()
    mixing = torch.linalg.lstsq(sketch.T, stored.T, driver="gelsd").solution.T
    left, _, right = torch.linalg.svd(mixing, full_matrices=False)
    basis = (left @ right).to(span) @ span
    return basis.to(candidates), _residual(stored, sketch, mixing)


def _sketch(basis: Tensor, columns: int, seed: int) -> Tensor:
    """V Ω in float64, computed on V's device: on the CPU beside a GPU it would take longer than solving for V."""
    return basis @ gaussian(basis.shape[1], columns, seed).to(basis.device)


def _residual(stored: Tensor, sketch: Tensor, mixing: Tensor) -> float:
    (rank, columns), count = stored.shape, sketch.shape[0]
    defect = torch.linalg.matrix_norm(mixing @ mixing.T - torch.eye(rank, dtype=mixing.dtype)) / rank**0.5
    surplus = columns - count
    if surplus <= 0:
        return float(defect)
    outside = torch.linalg.matrix_norm(stored - mixing @ sketch) / (surplus * rank) ** 0.5
    # A part of size ε outside the span enters T through least squares as noise of ε √c per row, so that T Tᵀ is off by
    # about ε √(2 c) + ε² c. Solved for ε, the defect is in the same units, and no larger unless T itself is wrong.
    c = count / max(surplus - 1, 1)
    within = (2.0 * defect / ((2.0 * c) ** 0.5 + (2.0 * c + 4.0 * c * defect).sqrt())).clamp_max(1.0)
    return float(torch.maximum(outside, within))


def _check_matrix(matrix: Tensor, what: str, shape: str) -> None:
    if matrix.dim() != 2 or not 0 < matrix.shape[0] <= matrix.shape[1]:
        raise ValueError(f"{what} has shape {tuple(matrix.shape)}; give a matrix {shape}.")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{what} holds NaN or infinity, so the file or base it is from is damaged; load another copy.")


@lru_cache(maxsize=8)
def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Standard normal numbers, float64, the same in every version and on every device: numpy freezes this stream."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((rows, columns)))
