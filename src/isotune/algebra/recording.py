"""Special cases for what follows the operations: export, to run them elsewhere, and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isotune.internals.torch_state import transform_level

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)  # not before torch 2.7


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace is recording, for a format that only has plain operations."""
    return bool(_is_exporting() or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_plain() -> bool:
    """Whether only operations of torch's own may be used, in an export or a transform of torch.func such as vmap.

    Autograd nodes written in Python are then avoided: neither ONNX nor TorchScript knows them, where nothing is
    differentiated, and the transforms have no rules for them.
    """
    # Not by a call of `is_exported`: every layer asks, several times in a pass, and each call of Python counts.
    exported = _is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(exported or (not torch.compiler.is_compiling() and transform_level() is not None))


def inverse_by_products(matrix: Tensor, start: Tensor, steps: int) -> Tensor:
    """A⁻¹ by Newton's iteration X ← X (2I − A X), for formats without factorisations.

    Args:
        matrix: A, (..., n, n).
        start: the first X, such that all eigenvalues of I − A X are below 1 in modulus; each step squares them.
        steps: number of iterations.
    """
    twice = 2 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        start = start @ (twice - matrix @ start)
    return start
