"""Where the quantising libraries, bitsandbytes above all, keep a packed weight and what belongs to it."""

from __future__ import annotations

import copy

from torch import Tensor, nn

_OF_THE_WEIGHT = ("_parameters", "_buffers", "state", "quant_state", "meta")
"""The attributes in which a layer keeps its packed weight and what dequantises it: `state` and `quant_state` are
bitsandbytes', `meta` is HQQ's."""
_CHANGED_IN_PLACE = ("_parameters", "_buffers", "state")


def copy_of(module: nn.Module) -> nn.Module:
    """A module of the same kind with the same tensors, which can be given others without changing this one."""
    copied = copy.copy(module)
    vars(copied).update({name: copy.copy(vars(module)[name]) for name in _CHANGED_IN_PLACE if name in vars(module)})
    return copied


def copy_to_write(module: nn.Module) -> nn.Module:
    """As `copy_of`, for PEFT to quantise another weight into: it marks the weight that it replaces as not quantised."""
    copied, weight = copy_of(module), module._parameters.get("weight")
    if weight is not None and "bnb_quantized" in vars(weight):
        copied.weight = copy.copy(weight)
        _point_to(copied, module)
    return copied


def exchange_weight(module: nn.Module, other: nn.Module) -> None:
    """Give a module the packed weight of another."""
    vars(module).update({name: vars(other)[name] for name in _OF_THE_WEIGHT if name in vars(other)})
    _point_to(module, other)


def _point_to(module: nn.Module, former: nn.Module) -> None:
    # bitsandbytes' parameter knows its layer, and writes to it when it is quantised.
    for parameter in module._parameters.values():
        if getattr(parameter, "module", None) is former:
            parameter.module = module  # type: ignore[union-attr]


def packed(module: nn.Module) -> Tensor:
    """The tensor of a quantised layer that holds the numbers of its weight."""
    for name in ("weight", "W_q", "qweight", "codes"):
        found = getattr(module, name, None)
        if isinstance(found, Tensor):
            return found
    raise ValueError(f"{type(module).__module__}.{type(module).__qualname__} has no packed weight")


def keep_readable(module: nn.Module) -> None:
    """Have bitsandbytes keep a 4-bit layer in the layout that it is dequantised and differentiated from.

    On a CPU with AVX512-BF16 an evaluation forward packs the weight into another layout, in place: dequantised from it
    W is garbage, and a training step through it has no gradient. There is no public option.
    """
    if getattr(module, "support_avx512bf16_for_cpu", None) is None:
        return
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # saving brings the ordinary layout back
