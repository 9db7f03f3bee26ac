"""Convolutions as hosts: each output channel's whole kernel is one row of W."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from isotune.hosts.host import Fold, WeightHost, widen


class _ConvHost(WeightHost):
    """A convolution, whatever its kernel, stride, padding, padding mode, dilation and groups.

    W is (out_channels, in_channels / groups · kernel elements). Adapters change W, from which the layer's own forward
    then computes: rotating the input instead would have to rotate each patch, and neighbouring patches overlap.
    """

    folds = True

    def call_folded(self, base_layer: nn.Module, fold: Fold, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution with the folded kernel, rounded once to the dtype of its own."""
        kernel = self.stored(fold(widen(self.weight.flatten(1)))).to(self.weight.dtype)
        result: Tensor = functional_call(base_layer, {self.weight_name(base_layer): kernel}, (x, *args), kwargs)
        return result


class Conv1dHost(_ConvHost):
    """nn.Conv1d."""

    kinds = ("torch.nn.Conv1d",)
    dimensions = 3

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """nn.Conv1d and its subclasses."""
        return isinstance(module, nn.Conv1d)


class Conv2dHost(_ConvHost):
    """nn.Conv2d."""

    kinds = ("torch.nn.Conv2d",)
    dimensions = 4

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """nn.Conv2d and its subclasses."""
        return isinstance(module, nn.Conv2d)


class Conv3dHost(_ConvHost):
    """nn.Conv3d."""

    kinds = ("torch.nn.Conv3d",)
    dimensions = 5

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """nn.Conv3d and its subclasses."""
        return isinstance(module, nn.Conv3d)
