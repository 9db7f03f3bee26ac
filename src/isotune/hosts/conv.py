"""Convolutions as hosts: each output channel's whole kernel is one row of W."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from isotune.hosts.host import Fold, WeightHost, attributes_of, widen
from isotune.internals.offloading import brought, is_managed

_DIMENSIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}


class ConvHost(WeightHost):
    """A convolution, whatever its kernel, stride, padding, padding mode, dilation and groups.

    W is (out_channels, in_channels / groups · kernel elements). Adapters change W, from which the layer's own forward
    then computes: rotating the input instead would have to rotate each patch, and neighbouring patches overlap.
    """

    kinds = tuple(f"torch.nn.{kind.__name__}" for kind in _DIMENSIONS)
    folds = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """nn.Conv1d, nn.Conv2d, nn.Conv3d and their subclasses."""
        return isinstance(module, tuple(_DIMENSIONS))

    @property
    def dimensions(self) -> int:
        """Of the weight: two, and those of the kernel."""
        return next(count for kind, count in _DIMENSIONS.items() if isinstance(self.module, kind))

    def call_folded(self, base_layer: nn.Module, fold: Fold, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution with the folded kernel, rounded once to the dtype of its own."""
        self.refuse_gathered_at_calls()
        module = self.module
        if self.weight.is_meta and base_layer is module and is_managed(module):
            with brought(module):  # accelerate's own forward would put the base's kernel in the place of this one
                kernel = self.stored(fold(widen(self.weight.flatten(1)))).to(self.weight.dtype)
                with attributes_of(module, {"weight": kernel, "bias": module.bias}):
                    return type(module).forward(module, x, *args, **kwargs)  # type: ignore[no-any-return]
        kernel = self.stored(fold(widen(self.weight.flatten(1)))).to(self.weight.dtype)
        return self.call_with(base_layer, kernel, x, *args, **kwargs)
