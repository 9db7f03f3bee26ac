"""Pinning: a small sketch of a basis from which the same basis is found again on the same or a similar weight."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MAX_RESIDUAL = 0.05


def pin_width(rank: int, in_features: int) -> int:
    """Say how many columns p the pin of a basis has; part of the file format."""
    return min(in_features, rank + max(8, rank // 4))


def candidate_rank(rank: int, in_features: int, out_features: int) -> int:
    """Say how many singular vectors of the base `recover` wants as candidates."""
    return min(in_features, out_features, rank + max(4, rank // 8))


def pin(basis: Tensor, *, seed: int = 0, oversampling: int | None = None) -> Tensor:
    """Sketch a basis V (r, in) as S = V Ω, (r, p) float32."""
    rank, width = basis.shape
    columns = pin_width(rank, width) if oversampling is None else min(width, rank + oversampling)
    return (basis.detach().cpu().double() @ _omega(width, columns, seed)).float()


def recover(pin: Tensor, candidates: Tensor, *, seed: int = 0) -> tuple[Tensor, float]:
    """Find the basis V (r, in) that `pin` was made of in the span of `candidates` (k, in); also the residual."""
    rank, columns = pin.shape
    count, width = candidates.shape
    span = candidates.detach().double()
    sketch = (span.cpu() @ _omega(width, columns, seed))
    stored = pin.detach().cpu().double()
    mixing = torch.linalg.lstsq(sketch.T, stored.T, driver="gelsd").solution.T
    left = stored - mixing @ sketch
    free = columns - count
    residual = float((left.square().sum() / (max(free, 1) * rank)).sqrt()) if free > 0 else 0.0
    defect = float((mixing @ mixing.T - torch.eye(rank, dtype=torch.float64)).square().sum().div(rank).sqrt())
    residual = max(residual, defect)
    factor, _, other = torch.linalg.svd(mixing, full_matrices=False)
    basis = (factor @ other).to(span) @ span
    return basis.to(candidates.dtype), residual


@lru_cache(maxsize=8)
def _omega(width: int, columns: int, seed: int) -> Tensor:
    # RandomState's stream is frozen by numpy's compatibility policy.
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((width, columns)))
