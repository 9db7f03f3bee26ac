"""BOFT (Liu et al., ICLR 2024, arXiv 2311.06243): a butterfly of block rotations with a gain for each output."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import keep_mask
from isotune.adapter.rotation import RotationAdapter
from isotune.algebra.butterfly import butterfly_blocks, butterfly_chain
from isotune.algebra.cayley import CayleyMap
from isotune.algebra.means import generator_means
from isotune.algebra.skew import skew_order, skew_size
from isotune.methods.checks import divisor_for, require, require_number, require_positive_integer
from isotune.methods.config import by_pattern
from isotune.methods.rotation import BlockRotationConfig


@dataclass
class BOFTConfig(BlockRotationConfig):
    """Configuration of BOFT: y = gain ⊙ (x B_m ⋯ B₂ B₁ Wᵀ) + bias, each B a block rotation at twice the last stride.

    Args:
        boft_block_size: block size b; 0 derives it as in_features / boft_block_num, or 4 if that is 0 too.
        boft_block_num: number of blocks per factor; 0 derives it as in_features / boft_block_size.
        boft_n_butterfly_factor: number of factors m; 1 is OFT with a gain. b · 2^(m − 1) must divide in_features.
        butterfly_factor_pattern: module name or regular expression -> m for these modules.
        boft_dropout: share of a factor's blocks that are replaced by the identity at each training step.
        boft_dropout_factors: share of the factors to which boft_dropout applies at each training step.

    Raises:
        ValueError: a value is not allowed or a combination has no effect; the message says what to change.
    """

    peft_bias, title = "boft_only", "BOFT"
    size_names = {"boft_block_size": "b", "boft_n_butterfly_factor": "m"}  # noqa: RUF012

    boft_block_size: int = field(default=0)
    boft_block_num: int = field(default=0)
    boft_n_butterfly_factor: int = field(default=1)
    butterfly_factor_pattern: dict[str, int] = field(default_factory=dict)
    boft_dropout: float = field(default=0.0)
    boft_dropout_factors: float = field(default=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_integer("boft_n_butterfly_factor", self.boft_n_butterfly_factor)
        require_number("boft_dropout", self.boft_dropout, below=1)
        share = self.boft_dropout_factors
        require(0.0 < share <= 1.0, "boft_dropout_factors", share, "it must be in (0, 1]")
        if share < 1.0 and not self.boft_dropout:
            raise ValueError("boft_dropout_factors has no effect with boft_dropout=0; set both, or leave it at 1.")
        for name in ("boft_block_size", "boft_block_num"):
            require_positive_integer(name, getattr(self, name) or 1)  # 0: derived from the other
        if self.boft_block_size and self.boft_block_num:
            raise ValueError(
                f"boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num} are both given; set "
                "one of them to 0, since each follows from the other."
            )

    def block_size_for(self, module: str, width: int) -> int:
        """The block size b for a module whose rotated side has this width.

        Raises:
            ValueError: the blocks do not divide the width, or the butterfly does not fit.
        """
        if own := self.own_block_size(module, width):
            size = own
        elif self.boft_block_num:
            size = width // divisor_for("boft_block_num", self.boft_block_num, module, width, side=self.side)
        else:
            size = divisor_for("boft_block_size", self.boft_block_size or 4, module, width, side=self.side)
        stages, most = self.factors_for(module), 1
        while size % 2 == 0 and width % (size * 2**most) == 0:
            most += 1
        if stages > most:
            raise ValueError(
                f"boft_n_butterfly_factor={stages} is too large for {module!r} with {width} {self.side}s and blocks of "
                f"{size}: the size must be even and {size} · 2^(m − 1) must divide {width}, so m may be at most "
                f"{most}. Choose a smaller m or another block size, or exclude the module with exclude_modules."
            )
        return size

    def factors_for(self, module: str) -> int:
        """The number m of factors for a module."""
        return int(by_pattern(self.butterfly_factor_pattern, module, self.boft_n_butterfly_factor))

    def rotation(self, module: str, width: int, out_features: int) -> BOFTOperator:
        size = self.block_size_for(module, width)
        dropout = (self.boft_dropout, self.boft_dropout_factors)
        cayley = CayleyMap(size, scaled=self.scaled_generator)
        return BOFTOperator(width, out_features, cayley, self.factors_for(module), dropout)

    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The number of blocks times their size, and the length of the gain."""
        _, blocks, entries = tensors["generator"].shape
        return blocks * skew_order(entries), len(tensors["output_gain"])


class BOFTOperator(RotationAdapter):
    """M = B_m ⋯ B₂ B₁, whose blocks are Cayley transforms, and the output gain.

    Args:
        width: width of the rotated side.
        out_features: number of rows of W.
        cayley: how each block, of size b, is made of its generator.
        stages: m.
        dropout: share of the blocks replaced by the identity in training, and share of the stages where this applies.
    """

    cayley: CayleyMap
    evaluated = ("generator",)
    beside = near_one = ("output_gain",)

    def __init__(
        self, width: int, out_features: int, cayley: CayleyMap, stages: int, dropout: tuple[float, float] = (0, 1)
    ) -> None:
        super().__init__(width, butterfly_chain(width, cayley.n, stages))
        self.block_size, self.cayley = cayley.n, cayley
        self.dropout, self.dropped_stages = dropout
        self.averages = generator_means(cayley, "output_gain")
        shape = (stages, width // cayley.n, skew_size(cayley.n))
        self.generator = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.output_gain = nn.Parameter(torch.ones(out_features, dtype=torch.float32))

    @property
    def gain(self) -> nn.Parameter:
        return self.output_gain

    def batch_key(self) -> Hashable:
        return self.cayley, bool(self.dropout)

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The folded blocks of `butterfly_chain`; with dropout, the blocks of all stages, which are folded later."""
        difference = self.cayley.difference(parameters["generator"])
        return (difference,) if self.dropout else butterfly_blocks(difference, self.block_size)

    def complete(self, tensors: tuple[Tensor, ...], drop: bool = False) -> tuple[Tensor, ...]:
        """The folded blocks; with `drop` some blocks of the stages are first set to zero, so that R = I there."""
        if not self.dropout:
            return tensors
        (difference,) = tensors
        if drop:
            kept = keep_mask(self.dropout, difference, *difference.shape[:2], 1, 1)
            stages = keep_mask(self.dropped_stages, difference, len(difference), 1, 1, 1)
            difference = difference * torch.maximum(kept, stages)
        return butterfly_blocks(difference, self.block_size)
