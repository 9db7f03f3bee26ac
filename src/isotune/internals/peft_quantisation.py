"""PEFT's reading and writing of quantised weights, which is public from 0.20 on and missing before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import peft.utils
from torch import nn

_LIBRARIES = {"aqlm", "awq", "bitsandbytes", "eetq", "gptqmodel", "hqq", "torchao"}
"""The packages whose layers and tensors PEFT reads from 0.20 on."""


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """What PEFT finds out about how a model was quantised; empty before PEFT 0.20."""
    found: Callable[..., dict[str, Any]] | None = getattr(peft.utils, "get_quantization_kwargs", None)
    return {} if found is None else found(model)


def resolve_quantization_backend(module: nn.Module, **kwargs: Any) -> Any:
    """PEFT's back end for a quantised module, or None.

    Raises:
        ValueError: PEFT is older than 0.20.
    """
    resolve: Callable[..., Any] | None = getattr(peft.utils, "resolve_quantization_backend", None)
    if resolve is None:
        kinds = (*type(module).__mro__, type(module._parameters.get("weight")))
        if not any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in kinds):
            return None
        raise ValueError(
            f"{type(module).__name__} is quantised, and PEFT {peft.__version__} cannot read or write such weights. "
            "Install a later version, pip install -U 'peft>=0.20', or exclude the module with exclude_modules."
        )
    return resolve(module, **kwargs)


def is_forward_only(backend: Any) -> bool:
    """Whether a back end declares that its library's weights cannot be dequantised."""
    utils = sys.modules.get("peft.utils.quantization_utils")
    return utils is not None and isinstance(backend, utils.ForwardOnlyQuantizationBackend)
