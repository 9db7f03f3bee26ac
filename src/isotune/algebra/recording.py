"""Whether the operations that run now are written down to be run elsewhere."""

from __future__ import annotations

import torch


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace records, for a place where only plain operations exist.

    Then nodes of autograd written in Python are left out: what is recorded is never differentiated, and neither ONNX
    nor TorchScript knows them.
    """
    exporting = getattr(torch.compiler, "is_exporting", bool)  # not before torch 2.7
    return bool(exporting()) or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
