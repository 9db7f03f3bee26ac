"""Choosing where the Triton kernels are used."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from isotune.algebra.recording import is_plain

DEVICE = "cuda"


@functools.cache
def load(name: str) -> Any:
    """Import a module of kernels by its name in `isotune.algebra`; None if Triton is missing or does not load."""
    try:
        return importlib.import_module(f"isotune.algebra.{name}")
    except Exception:  # a Triton that does not fit this Python or torch may raise anything
        return None


def kernels_for(tensor: Tensor, name: str) -> Any:
    """The module of kernels for a tensor; None if there is none, as on a CPU and in traced code."""
    if tensor.device.type != DEVICE or torch.compiler.is_compiling() or is_plain():
        return None
    return load(name)
