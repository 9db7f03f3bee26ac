"""Base classes for the configurations of all rotations: the side of a layer that is rotated, and block sizes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from isotune.adapter.rotation import RotationAdapter
from isotune.methods.checks import divisor_for
from isotune.methods.config import IsotuneConfig, by_pattern


@dataclass
class RotationConfig(IsotuneConfig):
    """Fields shared by the methods that rotate all inputs, or all outputs, of each layer.

    Args:
        side: "input" for y = host(x M), merged W' = W Mᵀ, or "output" for y = M · host(x), merged W' = M W, with the
            bias unchanged. With "output", what a method's documentation says of inputs applies to outputs.
    """

    format_since: ClassVar[Mapping[str, int]] = {"side": 2}

    side: Literal["input", "output"] = field(default="input")

    def build_operator(self, module: str, in_features: int, out_features: int) -> RotationAdapter:
        """A new operator for the configured side of a module, the identity at the start.

        Raises:
            ValueError: the configuration does not fit a side of this width.
        """
        return self._on_side(module, out_features if self.side == "output" else in_features, out_features)

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> RotationAdapter:
        """A new operator of the size that these tensors have."""
        return self._on_side(module, *self.widths_of(tensors))

    def _on_side(self, module: str, width: int, out_features: int) -> RotationAdapter:
        adapter = self.rotation(module, width, out_features)
        adapter.side = self.side
        return adapter

    @abstractmethod
    def rotation(self, module: str, width: int, out_features: int) -> RotationAdapter:
        """A new operator on vectors of the rotated side's width.

        Raises:
            ValueError: the configuration does not fit.
        """

    @abstractmethod
    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The width and out_features that an operator's tensors imply; arbitrary where they do not matter."""


@dataclass
class BlockRotationConfig(RotationConfig):
    """Fields shared by the methods that rotate blocks of coordinates.

    Args:
        block_size_pattern: module name or regular expression -> block size for these modules.
        scaled_generator: make Q of the trained entries divided by 2 √(b − 1) for blocks of b, so that one learning rate
            serves more block sizes; the rate is then larger by about that factor.
    """

    format_since = {**RotationConfig.format_since, "scaled_generator": 3}  # noqa: RUF012
    size_pattern = "block_size_pattern"
    scaled_learning_rate = 1.25e-2

    block_size_pattern: dict[str, int] = field(default_factory=dict)
    scaled_generator: bool = field(default=False)

    def own_block_size(self, module: str, width: int) -> int | None:
        """The block size that the pattern gives a module whose rotated side has this width; None if it gives none.

        Raises:
            ValueError: the size does not divide the width.
        """
        size = by_pattern(self.block_size_pattern, module, None)
        return None if size is None else divisor_for("block_size_pattern", size, module, width, side=self.side)
