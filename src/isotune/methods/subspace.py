"""The base classes of configurations of methods whose subspaces may move in training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from isotune.adapter.subspace import SubspaceAdapter
from isotune.adapter.update import PlacedUpdate
from isotune.methods.basis import BasisConfig
from isotune.methods.checks import require


@dataclass
class MovableConfig(BasisConfig):
    """Fields shared by the methods whose subspaces may move in training.

    Args:
        accumulated_ranks: module name -> rank of the update accumulated on earlier subspaces. Files of adapters whose
            subspaces have moved (`isotune.moving`) say it; leave it empty.
    """

    format_since: ClassVar[Mapping[str, int]] = {"accumulated_ranks": 3}

    accumulated_ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = all(rank >= 0 for rank in self.accumulated_ranks.values())
        require(fits, "accumulated_ranks", self.accumulated_ranks, "each rank must be an integer of at least 0")
        if self.accumulated_ranks and self.basis != "embedded":
            raise ValueError(
                f"basis={self.basis!r} is not allowed with accumulated_ranks: the file of an adapter whose subspaces "
                "have moved holds them themselves. Set basis='embedded', or leave accumulated_ranks empty."
            )

    def accumulated_rank(self, module: str) -> int | None:
        """The entry of `accumulated_ranks` for a module."""
        return self.accumulated_ranks.get(module)

    def build_operator(self, module: str, in_features: int, out_features: int) -> PlacedUpdate:
        """A new adapter, not placed yet.

        Raises:
            ValueError: the rank is larger than the smaller side of the weight.
        """
        rank, limit = self.rank_of(module), min(in_features, out_features)
        if rank > limit:
            raise ValueError(
                f"r={rank} is too large for the module {module!r}, whose weight is {out_features} × {in_features}; the "
                f"rank may be at most {limit}. Choose a smaller r, give this module its own with "
                f"rank_pattern={{{module!r}: {limit}}}, or exclude it with exclude_modules."
            )
        return self.scaled(module, self.update_of(rank, in_features, out_features))

    @abstractmethod
    def update_of(self, rank: int, in_features: int, out_features: int) -> PlacedUpdate:
        """A new adapter of a rank on a weight of this shape."""


@dataclass
class SubspaceConfig(MovableConfig):
    """Fields shared by the methods that act on the principal subspace of each weight."""

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> SubspaceAdapter:
        """A new operator of the configured rank."""
        return self.scaled(module, self.subspace_operator(self.rank_of(module)))

    def update_of(self, rank: int, in_features: int, out_features: int) -> SubspaceAdapter:
        """A new operator, whatever the shape."""
        return self.subspace_operator(rank)

    @abstractmethod
    def subspace_operator(self, rank: int) -> SubspaceAdapter:
        """A new operator on r coordinates, the identity at the start, with its dropout and power."""


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
