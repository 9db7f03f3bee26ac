"""How the weight of a quantised module is read and written, and whether a model can be trained through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isotune.hosts import FactoredLinear, Host, is_packed
from isotune.hosts.quantised import Backend, Functions, QuantisedHost, functions_for, product_with_identity
from isotune.internals.peft_quantisation import is_forward_only, resolve_quantization_backend

_MULTIPLYING = {"gptq": "gptqmodel (gptq)", "awq": "gptqmodel (awq)", "aqlm": "aqlm"}
"""Libraries whose kernels can only multiply: PEFT's name -> the name in messages."""


def backend_of(module: nn.Module, key: str, get_apply_tensor_subclass: Any = None) -> Backend | None:
    """How a quantised module's weight is read and written; None if the module is not quantised."""
    own = functions_for(module, key)
    if own is not None:
        return own
    weight = module._parameters.get("weight")
    if isinstance(module, FactoredLinear) or (type(weight) is nn.Parameter and weight.is_floating_point()):
        return None  # PEFT would import every installed quantisation library
    # Of a torchao model whose configuration is not known, nothing says how to quantise it again.
    how = get_apply_tensor_subclass or (lambda: None)
    backend: Any = resolve_quantization_backend(module, get_apply_tensor_subclass=how)
    if is_forward_only(backend):
        if backend.backend_name == "aqlm":
            _refuse_racing(module, key)
        if backend.backend_name in _MULTIPLYING:
            return Functions(_MULTIPLYING[backend.backend_name], product_with_identity)
        raise ValueError(
            f"The target module {key!r} is quantised by {backend.backend_name}, whose weights cannot be dequantised, "
            f"so it cannot be adapted. Supported: {', '.join(QuantisedHost.kinds)}. Quantise the base with one of "
            "these, or exclude the module with exclude_modules."
        )
    if backend is not None and backend.backend_name == "torchao" and get_apply_tensor_subclass is None:
        backend.supports_merge = False
    found: Backend | None = backend
    return found


def refuse_without_gradient(host: Host, key: str) -> None:
    """Refuse to train on a quantised layer that gives its input no gradient, as torchao's that quantise it, too.

    Nothing before such a layer would be trained, a rotation of its input the least.
    """
    weight = host.weight
    if weight.is_meta or not is_packed(type(weight)):
        return
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, host.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        try:
            y: torch.Tensor = host.module.forward(x)  # without hooks, to which this is no call
            (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True) if y.requires_grad else (None,)
        except (NotImplementedError, RuntimeError):  # it cannot be asked here, as weights packed for another device
            return
    if gradient is None:
        raise ValueError(
            f"{key!r} is quantised together with its inputs, and gives them no gradient, so nothing before it can be "
            "trained. Quantise weights only (torchao's Int8WeightOnlyConfig, for example), or exclude the module with "
            "exclude_modules."
        )


def _refuse_racing(module: Any, key: str) -> None:
    """Refuse AQLM's CPU kernel for small codebooks: its threads race, and it has no backward."""
    if module.codebook_size == 256 and not module.codes.is_cuda:
        raise ValueError(
            f"The target module {key!r} is quantised by aqlm with codebooks of 8 bits, whose CPU kernel gives "
            "different results at every call (its threads race) and has no gradient. Move the model to a GPU first, "
            "use a model with codebooks of 16 bits, or exclude the module with exclude_modules."
        )
