"""What differs where the operations that run now are written down to be run elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace records, for a place where only plain operations exist.

    Then nodes of autograd written in Python are left out: what is recorded is never differentiated, and neither ONNX
    nor TorchScript knows them.
    """
    exporting = getattr(torch.compiler, "is_exporting", bool)  # not before torch 2.7
    return bool(exporting()) or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def inverse_by_products(matrix: Tensor, start: Tensor, steps: int) -> Tensor:
    """A⁻¹ by Newton's iteration X ← X (2I − A X), for formats that have no factorisation.

    Args:
        matrix: A, (..., n, n).
        start: the first X, with all eigenvalues of I − A X below 1; each step squares them.
        steps: how many.
    """
    twice = 2 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        start = start @ (twice - matrix @ start)
    return start
