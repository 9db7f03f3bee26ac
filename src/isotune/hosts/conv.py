"""Convolutions as hosts: each output channel's whole kernel is one row of W."""

from __future__ import annotations

from torch import Tensor, nn

from isotune.hosts.host import Host
from isotune.parallel.sharding import shape_of

_DIMENSIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}


class ConvHost(Host):
    """A convolution with any kernel, stride, padding, padding mode, dilation and groups.

    W is (out_channels, in_channels / groups · kernel elements). Adapters change W, which the layer's own forward then
    uses: rotating the input instead would mean rotating each patch, and neighbouring patches overlap.
    """

    kinds = tuple(f"torch.nn.{kind.__name__}" for kind in _DIMENSIONS)
    modules = tuple(_DIMENSIONS)
    folds = True

    @property
    def dimensions(self) -> int:
        """The number of dimensions of the weight: two, plus those of the kernel."""
        return next(count for kind, count in _DIMENSIONS.items() if isinstance(self.module, kind))

    def seen(self, weight: Tensor) -> Tensor:
        """The weight with all dimensions but the first flattened."""
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """W in the shape of the weight."""
        return matrix.reshape(shape_of(self.weight))
