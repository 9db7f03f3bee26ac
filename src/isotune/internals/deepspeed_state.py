"""What DeepSpeed ZeRO writes on parameters and modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter of DeepSpeed ZeRO-3: empty but for the times when it is gathered."""
    return hasattr(tensor, "ds_id")


def is_gathered(parameter: Any) -> bool:
    """Whether all elements of a partitioned parameter are here now; there is no public question."""
    return bool(parameter.ds_status.name == "AVAILABLE")


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a partitioned parameter with all its elements; its own is that of nothing."""
    return torch.Size(parameter.ds_shape)


def gathering(parameters: Iterable[Tensor]) -> Any:
    """A block in which partitioned parameters are here; every process must enter it."""
    return _zero().GatheredParameters(list(parameters))


def gather_with(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have ZeRO-3 gather parameters of other modules too when it gathers those of `module`, forward and backward.

    Args:
        module: whose forward reads them.
        parameters: those that are not partitioned are left out; what is registered already stays so.
    """
    for parameter in parameters:
        if is_partitioned(parameter):
            _zero().register_external_parameter(module, parameter)


def takes_gradients(model: nn.Module) -> bool:
    """Whether ZeRO has linked the parameters of a model to its own copies, and empties `.grad` before an optimiser."""
    return any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters())


def _zero() -> Any:
    # Only who has imported DeepSpeed can have partitioned a parameter, so isotune never imports it.
    return sys.modules["deepspeed"].zero
