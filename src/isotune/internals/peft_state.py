"""What PEFT keeps on its layers and wrappers under private names."""

from __future__ import annotations

from typing import Any


def set_active_of(wrapper: Any, names: Any) -> None:
    """Set the active adapters of a ModulesToSaveWrapper; the public `set_adapter` also sets requires_grad."""
    wrapper._active_adapter = names


def psoft_basis(layer: Any, adapter_name: str) -> tuple[Any, Any]:
    """A' (r, in) and B' (out, r) of PEFT's own PSOFT, which it computes from the base's weight and never saves."""
    return layer._psoft_A_cache[adapter_name], layer._psoft_B_cache[adapter_name]
