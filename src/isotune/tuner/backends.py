"""Choosing the layer for a module."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from isotune.hosts import LinearHost
from isotune.tuner.layer import Layer, Linear
from isotune.tuner.quantisation import backend_of


def adapt(module: nn.Module, key: str = "", **quantisation: Any) -> Layer:
    """Make a layer, without adapters yet, around a module that may already be another tuner's layer.

    Args:
        module: the module to adapt.
        key: its name in the model, for messages.
        quantisation: the result of PEFT's `get_quantization_kwargs` for the model.

    Raises:
        ValueError: the module cannot be a host.
    """
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = backend_of(inner, key, **quantisation)
    return (Layer if backend is None and not LinearHost.accepts(inner) else Linear)(module, key, backend)
