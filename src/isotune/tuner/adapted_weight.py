"""A layer's weight for code that reads it: its metadata at no cost, its values with the adapters folded in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from isotune.hosts.computed_weight import ComputedWeight

_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "is_meta", "layout", "is_cpu", "is_cuda")
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.element_size),
}
"""What is answered without computing the values; much code only reads a weight's dtype."""


class AdaptedWeight(ComputedWeight):
    """A stand-in for a layer's weight: any use of its values computes them, with the active adapters folded in."""

    make: Callable[[], Tensor]
    layer: str

    @staticmethod
    def of(base: Tensor, make: Callable[[], Tensor], layer: str) -> AdaptedWeight:
        """Make the stand-in for a base weight; `make` computes the adapted weight, differentiably, at each use."""
        weight = base.detach().as_subclass(AdaptedWeight)
        weight.make, weight.layer = make, layer
        return weight

    @property
    def instead(self) -> str:  # type: ignore[override]
        """What to do instead of writing."""
        return (
            f"Change the base layer's own weight, get_base_layer().weight of {self.layer!r}, or merge the adapters "
            "first; where it is the model that writes, exclude the module with exclude_modules."
        )

    @classmethod
    def read(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Answer from the base's weight where that suffices, and pass the adapted weight to everything else."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT:
                return func(*args, **kwargs)
            args, kwargs = tree_map(lambda one: one.make() if isinstance(one, AdaptedWeight) else one, (args, kwargs))
        return func(*args, **kwargs)

    def as_data(self) -> AdaptedWeight:
        """A stand-in whose values have no gradient."""
        return AdaptedWeight.of(self.as_subclass(Tensor), lambda: self.make().detach(), self.layer)
