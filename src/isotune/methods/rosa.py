"""ROSA (Hameed et al., 2024, arXiv 2407.07802): trains the factors of a part of each weight, another in each epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from isotune.adapter.placement import Placement
from isotune.adapter.restarting import RestartingAdapter
from isotune.methods.checks import require, shown
from isotune.methods.config import exactly
from isotune.methods.subspace import RestartingConfig
from isotune.subspace.selection import chosen, drawn_start, generator_for


@dataclass
class RosaConfig(RestartingConfig):
    """Configuration of ROSA: W' = W − B₀ A₀ + B A, trained from B₀ A₀ = U_I S_I V_Iᵀ, r singular triplets of W.

    With a `MovingSchedule(unit="epoch", select="band")` it takes other triplets of the weight so far after each epoch.

    Args:
        r: how many triplets; rank of B A.
        rank_share: choose r for each module instead, when the adapter is made, as this share of the smaller side of its
            weight, rounded down, at least 1. Not stored in the file, whose rank_pattern has the numbers.
        sample_method: which triplets are taken first: "random", neighbours at a place drawn from basis_seed and the
            module's name; the "top" or the "bottom" ones. The schedule says which are taken later.
        factorize_method: "equal" takes the triplets out of W, so that the model starts at its base; "add" leaves them
            in W too, so that it starts at W + B₀ A₀; "random" starts at A = 0 and a random B, whatever the triplets.
        basis_seed: seed of what is drawn when the adapter is made.

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title, usual_learning_rate = "ROSA", 2e-4
    asking = (*RestartingConfig.asking, "rank_share")
    runtime_fields = (*RestartingConfig.runtime_fields, "rank_share")
    fits_by_shape = True

    rank_share: float | None = field(default=None)
    sample_method: Literal["random", "top", "bottom"] = field(default="random")
    factorize_method: Literal["equal", "add", "random"] = field(default="equal")

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.rank_share
        require(share is None or 0.0 < share <= 1.0, "rank_share", share, "it must be in (0, 1], or None")
        if share is not None and ("r" in self.given or self.rank_pattern):
            raise ValueError(
                f"rank_share={share} decides the ranks, but r={self.r} with rank_pattern={shown(self.rank_pattern)} is "
                "given too; leave rank_share out, or r and rank_pattern."
            )

    @property
    def selection(self) -> str:
        return "band" if self.sample_method == "random" else self.sample_method

    def directions(self, module: str, count: int, rank: int) -> Tensor:
        drawn = self.selection == "band"
        start = drawn_start(count, rank, generator_for(self.basis_seed, 0, module)) if drawn else None
        return chosen(count, rank, self.selection, start=start)

    def fit(self, module: str, shape: tuple[int, int], singular_values: Tensor) -> None:
        """Choose the rank of a module by rank_share."""
        assert self.rank_share is not None
        self.rank_pattern[exactly(module)] = max(int(self.rank_share * min(shape)), 1)

    def update_of(self, rank: int, in_features: int, out_features: int) -> RosaAdapter:
        return RosaAdapter(rank, in_features, out_features, self.factorize_method)


class RosaAdapter(RestartingAdapter):
    """A and B from the singular triplets of the current weight, A₀ = S_I V_Iᵀ and B₀ = U_I.

    The authors' code has the singular values with the factor that reads the input, too.

    Args:
        size: r.
        in_features, out_features: of W.
        factorize_method: as in `RosaConfig`.
    """

    def __init__(self, size: int, in_features: int, out_features: int, factorize_method: str) -> None:
        super().__init__(size, in_features, out_features)
        self.splits, self.subtracted = factorize_method != "random", factorize_method == "equal"

    def start(self, placement: Placement, generator: torch.Generator) -> dict[str, Tensor]:
        """A₀ and B₀; with "random" A = 0 and B drawn from a normal distribution."""
        if self.splits:
            return {"lora_A": placement.down[..., : self.size, :], "lora_B": placement.up[..., : self.size]}
        drawn = torch.randn(self.lora_B.shape, generator=generator)
        return {"lora_A": torch.zeros_like(self.lora_A), "lora_B": drawn}
