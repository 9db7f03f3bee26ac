"""OFT on a single layer, without a model around it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from isotune.methods.oft import OFTConfig
from isotune.tuner import layer

__all__ = ["Linear", "OFTConfig"]


class Rotation(NamedTuple):
    """The trainable parameters of one adapter's rotation."""

    weight: nn.Parameter
    """(blocks, b(b − 1)/2), or (1, b(b − 1)/2) with block_share."""


class Linear(layer.Linear):
    """A linear layer with an OFT adapter, called like the layer itself.

    Args:
        base_layer: nn.Linear or GPT-2's Conv1D; its parameters are frozen.
        adapter_name: name of the first adapter.
        r: like oft_block_size and all further options, as in `OFTConfig`.

    Raises:
        ValueError: as in `OFTConfig`, or the blocks do not fit the layer.

    Examples:
        >>> layer = Linear(nn.Linear(8, 4), oft_block_size=4)
        >>> layer.oft_R["default"].weight.shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        r: int | None = None,
        oft_block_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        config = OFTConfig(r=r, oft_block_size=oft_block_size, **options)
        self._active_adapter = adapter_name
        self.base_layer.requires_grad_(False)
        self.update_layer(adapter_name, config)

    @property
    def oft_R(self) -> dict[str, Rotation]:
        """Adapter name -> its trainable parameters, as `.weight`."""
        generators: dict[str, Any] = {name: self.adapter(name).generator for name in self.isotune_operator}
        return {name: Rotation(generator) for name, generator in generators.items()}
