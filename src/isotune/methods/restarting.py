"""The base class of configurations of methods that train both factors of an update, from a start on a subspace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
