"""The best low-rank approximation of a matrix, as two factors, with its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isotune.subspace.precision import doubled, exact_product
from isotune.subspace.solvers import principal_subspace

_FIRST_GUESS = 64
_SMALL = 1024
"""Up to this side, all singular vectors at once cost less than guessing one rank after the other."""
_TOLERANCE = 1e-3
_NEGLIGIBLE = 1e-7
"""Share of the largest singular value of a sum of updates below which a direction is rounding."""


class Factored(NamedTuple):
    """up (out, k) and down (k, in), the error ‖Δ − up · down‖_F of their product, and the norm ‖Δ‖_F."""

    up: Tensor
    down: Tensor
    missing: float
    norm: float


def check_truncation(rank: int | None, energy: float | None) -> None:
    """Refuse a rank below 1, a share of the energy that is not between 0 and 1, or both at once.

    Raises:
        ValueError: a value is not allowed; names it and what is allowed.
    """
    if rank is not None and energy is not None:
        raise ValueError(f"rank={rank} and energy={energy} are both given; give one of them.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} is not allowed; it must be an integer of at least 1.")
    if energy is not None and not 0.0 < energy < 1.0:
        raise ValueError(f"energy={energy!r} is not allowed; it must be above 0 and below 1, such as 0.999.")


def truncate(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factored:
    """The best approximation Δ ≈ up · down in the Frobenius norm, of a given rank or the smallest rank for an energy.

    Args:
        matrix: Δ, (out, in).
        rank: k; limited to the smaller side of Δ.
        energy: the least share of ‖Δ‖²_F that up · down must hold, below 1.

    Returns:
        The factors, at least float32, down with orthonormal rows. A zero matrix gives zeros of rank 1.

    Raises:
        ValueError: neither or both of rank and energy are given, a value is not allowed, or Δ is not finite.

    Examples:
        >>> import torch
        >>> found = truncate(torch.diag(torch.tensor([4.0, 2.0, 1.0])), rank=2)
        >>> (found.up @ found.down).round(decimals=4)
        tensor([[4., 0., 0.],
                [0., 2., 0.],
                [0., 0., 0.]])
        >>> round(found.missing, 4)
        1.0

    Source: Eckart and Young (1936): the leading singular vectors give the best one.
    """
    check_truncation(rank, energy)
    if rank is None and energy is None:
        raise ValueError("Neither rank nor energy is given; give one of them to set the quality of the approximation.")
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    norm, limit = _norm(wide), min(wide.shape)
    if norm == 0.0:
        return Factored(wide.new_zeros(len(wide), 1), wide.new_zeros(1, wide.shape[1]), 0.0, 0.0)
    guess = rank or (limit if limit <= _SMALL else _FIRST_GUESS)
    while True:
        # Beyond a third of the directions, the exact answer is as cheap.
        guess = limit if 3 * guess > limit else guess
        down = principal_subspace(wide, guess, tolerance=_TOLERANCE, name="the update").basis
        up = exact_product(wide, down.T)
        kept = torch.linalg.vector_norm(up, dim=0, dtype=torch.float64).square().cumsum(0) / norm**2
        if rank is not None or guess == limit or float(kept[-1]) >= float(energy or 0.0):
            break
        guess *= 3
    count = min(limit, rank) if rank is not None else _least(kept, float(energy or 0.0))
    up, down = up[:, :count].contiguous(), down[:count].contiguous()
    return Factored(up, down, _norm(wide - exact_product(up, down)), norm)


def truncate_product(up: Tensor, down: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factored:
    """`truncate` Δ = up · down, given only its factors (out, r) and (r, in); without rank and energy, return them.

    Raises:
        ValueError: a value is not allowed.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 5.2: with up = Q₁R₁ and downᵀ = Q₂R₂ the singular
    vectors of R₁R₂ᵀ, at most r × r, give those of Δ.
    """
    check_truncation(rank, energy)
    left, values, right = decomposed(up, down)
    energies = values.square()
    norm = float(energies.sum()) ** 0.5
    count = len(down)
    if rank is not None:
        count = min(rank, count)
    elif energy is not None:
        count = _least(energies.cumsum(0) / norm**2, energy) if norm else 1
    if count >= len(down):
        return Factored(up, down, 0.0, norm)
    count = min(count, len(values))
    return Factored(
        (left[:, :count] * values[:count]).to(up),
        right[:count].to(down),
        float(energies[count:].sum()) ** 0.5,
        norm,
    )


def joined(updates: Sequence[tuple[Tensor, Tensor]], *, rank: int | None = None) -> Factored:
    """The sum of updates up · down as one update, exact unless its rank is limited.

    Args:
        updates: factors (out, rᵢ) and (rᵢ, in) each.
        rank: the largest rank; None for the rank that the sum has.

    Returns:
        The factors in float64, down with orthonormal rows, and the error of the limit. Directions whose singular value
        is below 1e-7 of the largest are rounding, and are left out either way.

    Raises:
        ValueError: rank is below 1.

    Source: as of `truncate_product`.
    """
    check_truncation(rank, None)
    left, values, right = decomposed(torch.cat([up for up, _ in updates], 1), torch.cat([down for _, down in updates]))
    full = int((values > _NEGLIGIBLE * values[0]).sum())
    count = full if rank is None else min(rank, full)
    lost, norm = (float(torch.linalg.vector_norm(one)) for one in (values[count:full], values))
    return Factored(left[:, :count] * values[:count], right[:count], lost, norm)


def decomposed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of up · down, left (out, r), values (r,) and right (r, in), in float64."""
    first, left = torch.linalg.qr(doubled(up.detach()))
    second, right = torch.linalg.qr(doubled(down.detach()).T)
    inner, values, outer = torch.linalg.svd(left @ right.T, full_matrices=False)
    return first @ inner, values, outer @ second.T


def pad_rank(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the same product, padded with zeros to (out, rank) and (rank, in)."""
    filling = rank - len(down)
    return torch.nn.functional.pad(up, (0, filling)), torch.nn.functional.pad(down, (0, 0, 0, filling))


def _least(kept: Tensor, energy: float) -> int:
    """The first count whose share reaches the energy, or all if rounding keeps the last from reaching it."""
    return min(len(kept), int((kept < energy).sum()) + 1)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
