"""GOFT and qGOFT (Ma et al., ICML 2024, arXiv 2404.04316): a tree of Givens rotations, exactly or nearly orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isotune.adapter.rotation import RotationAdapter
from isotune.algebra.givens import givens_blocks, givens_chain, pair_penalty, rotation_pairs
from isotune.algebra.means import linear_mean
from isotune.methods.checks import require_number
from isotune.methods.rotation import RotationConfig


@dataclass
class GOFTConfig(RotationConfig):
    """Configuration of GOFT: y = host(x M), M a tree of in_features − 1 Givens rotations, exactly orthogonal."""

    title = "GOFT"

    def rotation(self, module: str, width: int, out_features: int) -> RotationAdapter:
        if width < 2:
            raise ValueError(
                f"The module {module!r} has one {self.side}, which cannot be rotated; exclude it with exclude_modules."
            )
        return self.tree(width)

    def tree(self, width: int) -> RotationAdapter:
        """A new operator on vectors of this width."""
        return GOFTOperator(width)

    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """One more than the number of angles, or of qGOFT's pairs."""
        (rotations,) = tensors.values()
        return len(rotations) + 1, 1


@dataclass
class QGOFTConfig(GOFTConfig):
    """Configuration of qGOFT: GOFT with free 2 × 2 matrices as rotations, kept nearly orthogonal by a loss.

    Args:
        regularizer_weight: λ of the loss λ Σ (a₁b₁ + a₂b₂)² over all pairs, which `isotune.regularization_loss`
            returns; 0 for none.

    Raises:
        ValueError: the weight is below 0.
    """

    title = "qGOFT"

    regularizer_weight: float = field(default=1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("regularizer_weight", self.regularizer_weight)

    def tree(self, width: int) -> RotationAdapter:
        return QGOFTOperator(width, self.regularizer_weight)


class GOFTOperator(RotationAdapter):
    """The tree of rotations by `angles`, (n − 1,), ordered by level from stride 1, then by position."""

    evaluated = ("angles",)
    averages = {"angles": linear_mean}  # noqa: RUF012

    def __init__(self, size: int) -> None:
        super().__init__(size, givens_chain(size))
        self.angles = nn.Parameter(torch.zeros(size - 1, dtype=torch.float32))

    def randomize_parameters(self) -> None:
        """Draw angles of the same size at every width."""
        nn.init.normal_(self.angles, std=0.5)

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return givens_blocks(rotation_pairs(parameters["angles"]), self.size)


class QGOFTOperator(RotationAdapter):
    """The tree of free 2 × 2 matrices I + `pairs`, (n − 1, 2, 2), in the order of `GOFTOperator`."""

    orthogonal = False
    evaluated = ("pairs",)

    def __init__(self, size: int, regularizer_weight: float = 0.0) -> None:
        super().__init__(size, givens_chain(size))
        self.regularizer_weight = regularizer_weight
        self.pairs = nn.Parameter(torch.zeros(size - 1, 2, 2, dtype=torch.float32))

    def penalty(self) -> Tensor | None:
        """λ Σ (a₁b₁ + a₂b₂)²."""
        if not self.regularizer_weight:
            return None
        pairs = self.full_parameter("pairs")
        return self.regularizer_weight * pair_penalty(pairs + torch.eye(2, device=pairs.device))

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return givens_blocks(parameters["pairs"], self.size)
