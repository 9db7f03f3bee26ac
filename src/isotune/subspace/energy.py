"""How many singular triplets of a weight hold a share of its energy."""

from __future__ import annotations

from torch import Tensor


def rank_of_energy(singular_values: Tensor, energy: float) -> int:
    """The least k for which the k largest singular values hold a share of the squared Frobenius norm.

    Args:
        singular_values: all singular values of a weight, (n,), descending.
        energy: the share Σᵢ≤ₖ σᵢ² / Σᵢ σᵢ², above 0 and at most 1.

    Returns:
        k, from 1 to n; 1 for a zero weight.

    Examples:
        >>> import torch
        >>> rank_of_energy(torch.tensor([3.0, 4.0, 0.0]).sort(descending=True).values, 0.64)
        1
    """
    held = singular_values.detach().double().cpu().square().cumsum(0)
    # Up to rounding, since 64 % may be asked for of exactly 64 %.
    return 1 + int((held < energy * held[-1] * (1 - 1e-12)).sum())
