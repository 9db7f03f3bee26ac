"""The base class of configurations of methods that train both factors of an update, from a start on a subspace."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from isotune.adapter.restarting import RestartingAdapter
from isotune.methods.subspace import MovableConfig


@dataclass
class RestartingConfig(MovableConfig):
    """Fields shared by the methods whose two factors start on a subspace, which usually moves in training.

    Args:
        r: rank of the two factors.
        basis: "embedded" alone: the subspace is stored, since a pin finds only subspaces of the base's own weight.
    """

    size_pattern = ""  # its r is that of the update, whatever subspace it starts on

    r: int = field(default=8)
    basis: Literal["pinned", "embedded"] = field(default="embedded")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis != "embedded":
            raise ValueError(
                f"basis={self.basis!r} is not allowed with {type(self).__name__}, whose subspaces move to others than "
                "those of the base's weight, which alone a pin can find again. Leave basis out."
            )

    def build_operator(self, module: str, in_features: int, out_features: int) -> RestartingAdapter:
        """A new adapter, which starts when it is placed.

        Raises:
            ValueError: the rank is larger than the smaller side of the weight.
        """
        self.check_rank(module, in_features, out_features)
        adapter = self.restarting(self.rank_of(module), in_features, out_features)
        adapter.configured_scale = adapter.scale = self.scale_of(module)
        return adapter

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> RestartingAdapter:
        """As `build_operator`, from the shapes of the factors."""
        return self.build_operator(module, tensors["lora_A"].shape[1], tensors["lora_B"].shape[0])

    @abstractmethod
    def restarting(self, rank: int, in_features: int, out_features: int) -> RestartingAdapter:
        """A new adapter of this shape."""
