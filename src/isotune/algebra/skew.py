"""Skew-symmetric matrices and the vectors of their free entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isotune.algebra.constants import made_once


def skew_size(n: int) -> int:
    """The number of free entries of an n × n skew-symmetric matrix.

    Examples:
        >>> skew_size(4)
        6
    """
    return n * (n - 1) // 2


def skew_order(entries: int) -> int:
    """The size n of a skew-symmetric matrix with this many free entries, the inverse of `skew_size` for n ≥ 1.

    Examples:
        >>> skew_order(6)
        4
    """
    return round((1 + math.sqrt(1 + 8 * entries)) / 2)


def generator_scale(n: int) -> float:
    """The factor of a scaled generator, with which Q is made of the free entries times 1 / (2 √(n − 1)).

    Adam moves every entry by about the learning rate, whatever n is. If their signs are independent, the spectral norm
    of such a step grows like 2 √(n − 1) times the rate (Wigner's semicircle law). The signs of real gradients agree in
    part, and it grows faster (docs/evidence/one-rate.md), so that the factor makes the difference smaller.

    Args:
        n: the size of the matrix.

    Returns:
        The factor; 1 for n = 1, where Q has no entries.

    Source: OneTrainer, modules/module/oft_utils.py (`oft_scaled`), for the factor.

    Examples:
        >>> generator_scale(5)
        0.25
    """
    return 1 / (2 * math.sqrt(n - 1)) if n > 1 else 1.0


@made_once
def skew_positions(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the strict upper triangle, row by row, and of its mirror image in a flattened n × n matrix."""
    rows, columns = torch.triu_indices(n, n, offset=1, device=device).unbind(0)
    return rows * n + columns, columns * n + rows


def skew_from_vector(entries: Tensor, n: int) -> Tensor:
    """Build Q = U − Uᵀ from the entries of its strict upper triangle U, row by row.

    Args:
        entries: (..., n(n − 1)/2).
        n: the size of the matrix.

    Returns:
        (..., n, n), exactly skew-symmetric.

    Raises:
        ValueError: the last dimension of `entries` is not n(n − 1)/2.

    Examples:
        >>> skew_from_vector(torch.tensor([1.0, 2.0, 3.0]), 3)
        tensor([[ 0.,  1.,  2.],
                [-1.,  0.,  3.],
                [-2., -3.,  0.]])
    """
    if entries.shape[-1] != skew_size(n):
        raise ValueError(
            f"A skew-symmetric {n} × {n} matrix has {skew_size(n)} free entries, but {entries.shape[-1]} were given."
        )
    upper, _ = skew_positions(n, entries.device)
    flat = entries.new_zeros(*entries.shape[:-1], n * n).index_copy_(-1, upper, entries)
    triangle = flat.view(*entries.shape[:-1], n, n)
    return triangle - triangle.mT


def vector_from_skew(matrix: Tensor) -> Tensor:
    """Read the strict upper triangle of (..., n, n), row by row; the inverse of `skew_from_vector`."""
    return matrix.flatten(-2).index_select(-1, skew_positions(matrix.shape[-1], matrix.device)[0])
