"""A layer's weight for code that reads it: its metadata at no cost, its values with the adapters folded in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "is_meta", "layout", "is_cpu", "is_cuda")
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.element_size),
}
"""What is answered without computing the values; much code only reads a weight's dtype."""


class AdaptedWeight(Tensor):
    """A stand-in for a layer's weight: any use of its values computes them, with the active adapters folded in."""

    make: Callable[[], Tensor]

    @staticmethod
    def of(base: Tensor, make: Callable[[], Tensor]) -> AdaptedWeight:
        """Make the stand-in for a base weight; `make` computes the adapted weight, differentiably, at each use."""
        weight = base.detach().as_subclass(AdaptedWeight)
        weight.make = make
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer from the base's weight where that suffices, and pass the adapted weight to everything else."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map(lambda one: one.make() if isinstance(one, AdaptedWeight) else one, (args, kwargs))
        return func(*args, **(kwargs or {}))
