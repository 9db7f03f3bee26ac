"""What the configurations of all rotations have: the side of a layer on which they act."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from isotune.adapter.rotation import RotationAdapter
from isotune.methods.checks import divisor_for, require_expressions, require_positive_integer
from isotune.methods.config import IsotuneConfig, by_pattern


@dataclass
class RotationConfig(IsotuneConfig):
    """Fields shared by the methods that rotate all inputs, or all outputs, of each layer.

    Args:
        side: "input": y = host(x M), merged W' = W Mᵀ; or "output": y = M · host(x), merged W' = M W, the bias left as
            it is. What is said of a method's inputs is then said of its outputs.
    """

    side: Literal["input", "output"] = field(default="input")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side == "output":  # an earlier release would rotate the inputs
            self.isotune_format = max(self.isotune_format, 2)

    def to_dict(self) -> dict[str, Any]:
        """The fields that the file stores; the side only where it is not the inputs."""
        stored = super().to_dict()
        if self.side == "input":
            del stored["side"]
        else:  # also if it was set after the configuration was made
            stored["isotune_format"] = max(self.isotune_format, 2)
        return stored

    def build_operator(self, module: str, in_features: int, out_features: int) -> RotationAdapter:
        """A new operator on one side of a module, the identity at the start.

        Raises:
            ValueError: the configuration does not fit a side of this width.
        """
        return self._on_side(module, out_features if self.side == "output" else in_features, out_features)

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> RotationAdapter:
        """The operator of the widths that the tensors have."""
        return self._on_side(module, *self.widths_of(tensors))

    def _on_side(self, module: str, width: int, out_features: int) -> RotationAdapter:
        adapter = self.rotation(module, width, out_features)
        adapter.side = self.side
        return adapter

    @abstractmethod
    def rotation(self, module: str, width: int, out_features: int) -> RotationAdapter:
        """A new operator on vectors of a width, those of the side that is rotated.

        Raises:
            ValueError: the configuration does not fit.
        """

    @abstractmethod
    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The width and out_features that go with the tensors of an operator; any where they do not matter."""


@dataclass
class BlockRotationConfig(RotationConfig):
    """Fields shared by the methods that rotate blocks of coordinates.

    Args:
        block_size_pattern: module name or regular expression -> size of its blocks, where it differs from the others'.
    """

    block_size_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if name.endswith("_pattern") and isinstance(value, dict):
                require_expressions(name, value)
                for key, size in value.items():
                    require_positive_integer(f"{name}[{key!r}]", size)

    def own_block_size(self, module: str, width: int) -> int | None:
        """The size that the pattern says for a module, of which a side of that width is rotated; None for none.

        Raises:
            ValueError: it does not divide the width.
        """
        size = by_pattern(self.block_size_pattern, module, None)
        return None if size is None else divisor_for("block_size_pattern", size, module, width, side=self.side)
