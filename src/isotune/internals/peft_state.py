"""Private attributes of PEFT's layers and wrappers."""

from __future__ import annotations

from typing import Any


def set_active_of(wrapper: Any, names: Any, disabled: bool = False) -> None:
    """Set the active adapters of a ModulesToSaveWrapper; the public `set_adapter` would also set requires_grad.

    Args:
        wrapper: the wrapper around a saved module.
        names: the active adapters.
        disabled: whether it calls the original module anyway, as in PEFT 0.18 for other active adapters.
    """
    wrapper._active_adapter = names
    wrapper._disable_adapters = disabled


def psoft_basis(layer: Any, adapter_name: str) -> tuple[Any, Any]:
    """A' (r, in) and B' (out, r) of PEFT's own PSOFT, which it computes from the base's weight and never saves."""
    return layer._psoft_A_cache[adapter_name], layer._psoft_B_cache[adapter_name]
