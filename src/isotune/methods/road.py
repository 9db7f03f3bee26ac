"""RoAd (Liao and Monz, NeurIPS 2024, arXiv 2409.00119): pairs of outputs, each rotated and scaled by itself."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from isotune.adapter.rotation import RotationAdapter
from isotune.algebra.factors import Pairs
from isotune.algebra.means import geometric_mean, linear_mean
from isotune.methods.checks import require
from isotune.methods.rotation import RotationConfig

_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Variant -> how many angles, and as many scales, a pair has."""


@dataclass
class RoadConfig(RotationConfig):
    """Configuration of RoAd: y = M · host(x) without its bias, M made of 2 × 2 matrices on pairs of outputs.

    Args:
        variant: "road_1" has one angle and one scale for each pair, "road_2" one for each output, "road_4" one for each
            entry of the 2 × 2 matrices.
        group_size: the outputs are cut into groups of this size, which must divide their number; within a group, output
            i is paired with output i + group_size / 2. With 2, as in the paper, neighbours are pairs.
        side: "output", or "input" for y = host(x M).

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title = "RoAd"

    variant: Literal["road_1", "road_2", "road_4"] = field(default="road_1")
    group_size: int = field(default=64)
    side: Literal["input", "output"] = field(default="output")

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "it must be an even number of at least 2, since each group is cut into pairs"
        require(self.group_size >= 2 and self.group_size % 2 == 0, "group_size", self.group_size, allowed)

    def rotation(self, module: str, width: int, out_features: int) -> RoadOperator:
        if width % self.group_size:
            fitting = [size for size in range(2, width + 1, 2) if width % size == 0]
            near = sorted(fitting, key=lambda size: (abs(size - self.group_size), size))[:2]
            hint = f"the nearest that do are {' or '.join(map(str, near))}" if near else "no even number does"
            raise ValueError(
                f"group_size={self.group_size} does not divide the {width} {self.side}s of {module!r}; {hint}. Choose "
                "one that divides the width of every adapted module, or exclude this module with exclude_modules."
            )
        return RoadOperator(width, self.group_size, self.variant)

    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """Two for each pair; out_features does not matter."""
        return 2 * len(tensors["angles"]) // _NUMBERS[self.variant], 1


class RoadOperator(RotationAdapter):
    """M of the pairs by `angles` θ and `scales` α, of n / 2, n or 2 n numbers each, in PEFT's order.

    M takes a pair (y₁, y₂) to (α₁₁ cos θ₁₁ y₁ − α₁₂ sin θ₁₂ y₂, α₂₂ cos θ₂₂ y₂ + α₂₁ sin θ₂₁ y₁).

    Args:
        size: n.
        group: number of outputs of a group.
        variant: as in `RoadConfig`.

    Source: Liao and Monz (2024), equations 3 and 4 and table 1; the order of the numbers is that of
    peft/tuners/road/layer.py of PEFT 0.21.2.
    """

    orthogonal = False
    evaluated = ("angles", "scales")
    near_one = ("scales",)

    def __init__(self, size: int, group: int, variant: str = "road_1") -> None:
        factor = Pairs(group)
        super().__init__(size, (factor,))
        self.factor, self.variant = factor, variant
        if variant == "road_1":  # scaled rotations of a plane commute; the others are no group
            self.averages = {"angles": linear_mean, "scales": geometric_mean}
        count = size // 2 * _NUMBERS[variant]
        self.angles = nn.Parameter(torch.zeros(count, dtype=torch.float32))
        self.scales = nn.Parameter(torch.ones(count, dtype=torch.float32))

    def batch_key(self) -> Hashable:
        return self.size, self.factor.group, self.variant

    def randomize_parameters(self) -> None:
        """Draw angles and scales of the same size at every width."""
        nn.init.normal_(self.angles, std=0.5)
        nn.init.normal_(self.scales, mean=1.0, std=0.2)

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The diagonal of M − I, and the entry in the column of each output and the row of its partner, (..., n)."""
        (cosine, sine), (diagonal, other) = (self._of_outputs(parameters[name]) for name in ("angles", "scales"))
        # cos θ − 1 = −2 sin²(θ / 2) keeps the precision of a small angle.
        diagonal = (diagonal - 1) - 2 * diagonal * torch.sin(cosine / 2).square()
        entries = self.factor.halves(self.factor.partners(other * torch.sin(sine)))
        return diagonal, torch.cat([entries[..., :1, :], -entries[..., 1:, :]], dim=-2).flatten(-3)

    def _of_outputs(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each output in the diagonal, and in the other entry of its row, (..., n) each."""
        if self.variant == "road_4":
            own = numbers.reshape(*numbers.shape[:-1], -1, 2, self.factor.group)
            return own[..., 0, :].flatten(-2), own[..., 1, :].flatten(-2)
        if self.variant == "road_1":
            pairs = numbers.reshape(*numbers.shape[:-1], -1, 1, self.factor.group // 2)
            numbers = pairs.expand(*pairs.shape[:-2], 2, -1).flatten(-3)
        return numbers, numbers
