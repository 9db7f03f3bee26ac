"""What PEFT keeps on its layers and wrappers under private names."""

from __future__ import annotations

from typing import Any


def active_of(layer: Any) -> Any:
    """The active adapters of a tuner layer or wrapper, as they were set: a name or a list of names.

    The public property `active_adapters` makes a list at each call, which costs as much as an operation of torch.
    """
    return layer._active_adapter


def set_active_of(wrapper: Any, names: Any) -> None:
    """Set the active adapters of a ModulesToSaveWrapper for a while, without its changing what is trained.

    The public `set_adapter` also sets requires_grad.
    """
    wrapper._active_adapter = names


def is_disabled(layer: Any) -> bool:
    """Whether the adapters of a tuner layer are switched off; the public property costs a call for each layer."""
    disabled: bool = layer._disable_adapters
    return disabled


def psoft_basis(layer: Any, adapter_name: str) -> tuple[Any, Any]:
    """A' (r, in) and B' (out, r) of PEFT's own PSOFT, which it computes from the base's weight and never saves."""
    return layer._psoft_A_cache[adapter_name], layer._psoft_B_cache[adapter_name]
