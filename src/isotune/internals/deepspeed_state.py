"""Private attributes that DeepSpeed ZeRO sets on parameters and modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter of DeepSpeed ZeRO-3, which is empty except while it is gathered."""
    return hasattr(tensor, "ds_id")


def is_gathered(parameter: Any) -> bool:
    """Whether all elements of a partitioned parameter are here now; there is no public query."""
    return bool(parameter.ds_status.name == "AVAILABLE")


def full_shape(parameter: Any) -> torch.Size:
    """The full shape of a partitioned parameter, whose own shape is that of an empty tensor."""
    return torch.Size(parameter.ds_shape)


def gathering(parameters: Iterable[Tensor]) -> Any:
    """A context in which partitioned parameters are gathered; every process must enter it."""
    return _zero().GatheredParameters(list(parameters))


def gather_with(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have ZeRO-3 gather parameters of other modules whenever it gathers those of `module`, forward and backward.

    Args:
        module: the module whose forward reads them.
        parameters: the parameters; those not partitioned are skipped, and earlier ones stay registered.
    """
    for parameter in parameters:
        if is_partitioned(parameter):
            _zero().register_external_parameter(module, parameter)


def takes_gradients(model: nn.Module) -> bool:
    """Whether ZeRO has linked a model's parameters to its own copies, and so empties `.grad` before optimiser steps."""
    return any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters())


def _zero() -> Any:
    # A parameter can only be partitioned if DeepSpeed has been imported, so isotune never imports it.
    return sys.modules["deepspeed"].zero
