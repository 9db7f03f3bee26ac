"""Where quantisation libraries, bitsandbytes above all, keep a packed weight and what belongs to it."""

from __future__ import annotations

import copy

from torch import Tensor, nn

_OF_THE_WEIGHT = ("_parameters", "_buffers", "state", "quant_state", "meta")
"""Attributes in which a layer keeps its packed weight and what is needed to dequantise it: `state` and `quant_state`
are bitsandbytes', `meta` is HQQ's."""
_CHANGED_IN_PLACE = ("_parameters", "_buffers", "state")


def copy_of(module: nn.Module) -> nn.Module:
    """A copy of a module with the same tensors, which can be replaced without changing the original."""
    copied = copy.copy(module)
    vars(copied).update({name: copy.copy(vars(module)[name]) for name in _CHANGED_IN_PLACE if name in vars(module)})
    return copied


def copy_to_write(module: nn.Module) -> nn.Module:
    """Like `copy_of`, but safe for PEFT to quantise a new weight into: PEFT marks the old one as not quantised."""
    copied, weight = copy_of(module), module._parameters.get("weight")
    if weight is not None and "bnb_quantized" in vars(weight):
        copied.weight = copy.copy(weight)
        _point_to(copied, module)
    return copied


def exchange_weight(module: nn.Module, other: nn.Module) -> None:
    """Give a module the packed weight of another module."""
    vars(module).update({name: vars(other)[name] for name in _OF_THE_WEIGHT if name in vars(other)})
    _point_to(module, other)


def _point_to(module: nn.Module, former: nn.Module) -> None:
    # bitsandbytes' parameter refers to its layer, and writes to it when it is quantised.
    for parameter in module._parameters.values():
        if getattr(parameter, "module", None) is former:
            parameter.module = module  # type: ignore[union-attr]


def packed(module: nn.Module) -> Tensor:
    """The tensor that holds the packed weight of a quantised layer."""
    for name in ("weight", "W_q", "qweight", "codes"):
        found = getattr(module, name, None)
        if isinstance(found, Tensor):
            return found
    raise ValueError(f"{type(module).__module__}.{type(module).__qualname__} has no packed weight")


def keep_readable(module: nn.Module) -> None:
    """Have bitsandbytes keep a 4-bit layer in the layout that supports dequantisation and gradients.

    On a CPU with AVX512-BF16, a forward pass in evaluation mode repacks the weight in place into another layout, from
    which W dequantises to garbage and a training step has no gradient. There is no public option.
    """
    if getattr(module, "support_avx512bf16_for_cpu", None) is None:
        return
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # saving brings the ordinary layout back
