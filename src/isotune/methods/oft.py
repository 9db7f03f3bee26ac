"""OFT (Qiu et al., NeurIPS 2023, arXiv 2306.07280) and OFTv2 (2025): rotations of blocks of the inputs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import keep_mask
from isotune.adapter.rotation import RotationAdapter
from isotune.algebra.cayley import CayleyMap
from isotune.algebra.factors import BlockDiagonal
from isotune.algebra.means import generator_means
from isotune.algebra.skew import skew_order, skew_size
from isotune.methods.checks import divisor_for, require, require_number, require_positive_integer
from isotune.methods.rotation import BlockRotationConfig


@dataclass
class OFTConfig(BlockRotationConfig):
    """Configuration of OFT: y = host(x M), M block-diagonal with blocks R = (I + Q)(I − Q)⁻¹.

    Args:
        r: number of blocks; 0 or None derives it as in_features / oft_block_size.
        oft_block_size: block size b; 0 or None derives it as in_features / r, or 32 if r is not given either.
        adjust: "refuse" raises if the number of blocks or their size does not divide in_features; "nearest" warns and
            takes the nearest divisor, the lower of two.
        module_dropout: share of the blocks that are replaced by the identity at each training step.
        coft: bound the rotation (COFT): the Frobenius norm of the generators of all blocks together is at most eps.
        eps: the bound of COFT; each of the r blocks is bounded by eps / √r.
        block_share: share one rotation among all blocks.
        use_cayley_neumann: use the truncated Neumann series instead of the exact Cayley transform.
        num_cayley_neumann_terms: highest power of the series; more terms come closer to the exact transform.

    Raises:
        ValueError: a value is not allowed or a combination has no effect; the message says what to change.
    """

    peft_bias = "oft_only"
    title, size_names, presets = "OFT", {"oft_block_size": "b"}, {"coft": ("COFT", {"coft": True})}

    r: int | None = field(default=None)
    oft_block_size: int | None = field(default=None)
    adjust: Literal["refuse", "nearest"] = field(default="refuse")
    module_dropout: float = field(default=0.0)
    coft: bool = field(default=False)
    eps: float = field(default=6e-5)
    block_share: bool = field(default=False)
    use_cayley_neumann: bool = field(default=False)
    num_cayley_neumann_terms: int = field(default=5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("module_dropout", self.module_dropout, below=1)
        require_positive_integer("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        for name, value in (("r", self.r), ("oft_block_size", self.oft_block_size)):
            require(not value or value > 0, name, value, "it must be an integer of at least 1, or 0 to derive it")
        require(0 < self.eps < math.inf, "eps", self.eps, "it bounds a norm, so it must be above 0")
        if self.module_dropout and self.block_share:
            raise ValueError(
                "module_dropout has no effect with block_share=True, where there is only one block to drop; set "
                "module_dropout=0 or block_share=False."
            )

    def block_size_for(self, module: str, width: int) -> int:
        """The block size for a module whose rotated side has this width.

        Raises:
            ValueError: r or oft_block_size does not divide the width, or both are given and disagree.
        """
        if own := self.own_block_size(module, width):
            return own
        if not self.r:
            return divisor_for("oft_block_size", self.oft_block_size or 32, module, width, self.adjust, side=self.side)
        size = width // divisor_for("r", self.r, module, width, self.adjust, side=self.side)
        if self.oft_block_size and self.oft_block_size != size:
            raise ValueError(
                f"r={self.r} blocks of oft_block_size={self.oft_block_size} do not add up to the {width} {self.side}s "
                f"of {module!r}; set one of the two options to 0, or oft_block_size to {size}."
            )
        return size

    def rotation(self, module: str, width: int, out_features: int) -> OFTOperator:
        size = self.block_size_for(module, width)
        return OFTOperator(
            size,
            blocks := width // size,
            shared=self.block_share,
            neumann_terms=self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
            generator_bound=self.eps / math.sqrt(blocks) if self.coft else None,
            scaled=self.scaled_generator,
            dropout=self.module_dropout,
        )

    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The number of blocks times their size; with block_share only the one stored block counts."""
        blocks, entries = tensors["generator"].shape
        width = blocks * skew_order(entries)
        return width, width


class OFTOperator(RotationAdapter):
    """M = blockdiag(R₁, R₂, …), each R the Cayley transform of a skew-symmetric generator.

    Args:
        block_size: b.
        blocks: number of blocks.
        shared: one generator for all blocks, of shape (1, b(b − 1)/2) instead of (blocks, b(b − 1)/2).
        dropout: share of the blocks replaced by the identity in training.
        cayley: neumann_terms, generator_bound and scaled, as in `isotune.algebra.cayley.CayleyMap`.
    """

    cayley: CayleyMap
    evaluated = ("generator",)

    def __init__(
        self, block_size: int, blocks: int, *, shared: bool = False, dropout: float = 0.0, **cayley: Any
    ) -> None:
        super().__init__(block_size * blocks, (BlockDiagonal(block_size),))
        self.block_size, self.blocks, self.dropout = block_size, blocks, dropout
        self.cayley = CayleyMap(block_size, **cayley)
        self.averages, self.orthogonal = generator_means(self.cayley), self.cayley.neumann_terms is None
        shape = (1 if shared else blocks, skew_size(block_size))
        self.generator = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def batch_key(self) -> Hashable:
        return self.blocks, self.cayley

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """R − I of all blocks, (..., blocks, b, b)."""
        difference = self.cayley.difference(parameters["generator"])
        return (difference.expand(*difference.shape[:-3], self.blocks, -1, -1),)

    def complete(self, tensors: tuple[Tensor, ...], drop: bool = False) -> tuple[Tensor, ...]:
        """The same tensors; with `drop` some blocks are set to zero, so that R = I there."""
        if not (drop and self.dropout):
            return tensors
        (difference,) = tensors
        return (difference * keep_mask(self.dropout, difference, self.blocks, 1, 1),)
