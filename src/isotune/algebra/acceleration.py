"""Where the kernels in Triton are taken."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from isotune.algebra.recording import is_exported

DEVICE = "cuda"


@functools.cache
def load(name: str) -> Any:
    """A module of kernels by its name in `isotune.algebra`; None where Triton is missing or does not load."""
    try:
        return importlib.import_module(f"isotune.algebra.{name}")
    except Exception:  # what an installation that fits neither this Python nor this torch raises is not foreseeable
        return None


def kernels_for(tensor: Tensor, name: str) -> Any:
    """The module of kernels for a tensor; None where there is none, as on a CPU and in all that is traced."""
    if tensor.device.type != DEVICE or torch.compiler.is_compiling() or is_exported():
        return None
    return load(name)
