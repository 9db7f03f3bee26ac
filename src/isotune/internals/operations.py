"""Counting operations as torch runs them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    *("alias", "detach", "lift_fresh", "promote_types", "_unsafe_view", "_reshape_alias"),
}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of the aten operations that do work within its scope, without views and allocations.

    Those that autograd runs in backward are included. Each is one kernel, or a few, as for a factorisation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split(".")[0].split("::")
        if space == "aten" and not func.is_view and name not in _NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
