"""OFT on one layer, without a model around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from isotune.methods.oft import OFTConfig
from isotune.tuner import layer

__all__ = ["Linear", "OFTConfig", "Rotations"]


class Rotation(NamedTuple):
    """The trainable parameters of one adapter's rotation."""

    weight: nn.Parameter
    """(blocks, b(b − 1)/2), or (1, b(b − 1)/2) with block_share."""


class Rotations(Mapping[str, Rotation]):
    """The rotations of a layer by adapter name."""

    def __init__(self, owner: layer.Layer) -> None:
        self._owner = owner

    def __getitem__(self, adapter_name: str) -> Rotation:
        if adapter_name not in self._owner.isotune_operator:
            raise KeyError(adapter_name)
        generator: Any = self._owner.adapter(adapter_name).generator
        return Rotation(generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner.isotune_operator)

    def __len__(self) -> int:
        return len(self._owner.isotune_operator)


class Linear(layer.Linear):
    """An OFT adapter on a linear layer: a module to call like the layer itself.

    Args:
        base_layer: nn.Linear or GPT-2's Conv1D; its parameters are frozen.
        adapter_name: of the first adapter.
        r: this and all further ones as in `OFTConfig`.

    Raises:
        ValueError: as `OFTConfig`, or the blocks do not fit the layer.

    Example:
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
        module_dropout: float = 0.0,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        init_weights: bool = True,
        *,
        adjust: Literal["refuse", "nearest"] = "refuse",
        use_cayley_neumann: bool = False,
        num_cayley_neumann_terms: int = 5,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        config = OFTConfig(
            r=r,
            oft_block_size=oft_block_size,
            module_dropout=module_dropout,
            coft=coft,
            eps=eps,
            block_share=block_share,
            init_weights=init_weights,
            adjust=adjust,
            use_cayley_neumann=use_cayley_neumann,
            num_cayley_neumann_terms=num_cayley_neumann_terms,
        )
        self._active_adapter = adapter_name
        self.base_layer.requires_grad_(False)
        self.update_layer(adapter_name, config)

    @property
    def oft_R(self) -> Rotations:
        """Adapter name -> its trainable parameters, as `.weight`."""
        return Rotations(self)
