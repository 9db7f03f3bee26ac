"""OPLoRA (Xiong, Xie, AAAI 2026, arXiv 2510.13003): LoRA off the strongest singular directions of each weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from isotune.adapter.lowrank import ComplementAdapter
from isotune.adapter.subspace import SubspaceBasis
from isotune.methods.basis import BasisConfig
from isotune.methods.checks import require, require_number, require_positive_integer, shown
from isotune.methods.config import by_pattern, exactly
from isotune.subspace.energy import rank_of_energy


@dataclass
class OploraConfig(BasisConfig):
    """Configuration of OPLoRA: W' = W + (lora_alpha / r)·(I − U_k U_kᵀ) B A (I − V_k V_kᵀ), with trained B and A.

    U_k and V_k are the k strongest left and right singular vectors of W. These k triplets stay singular triplets of W',
    with the same singular values.

    Args:
        r: rank of B A.
        lora_alpha: the update is scaled by lora_alpha / r; None means r.
        lora_dropout: dropout on the input of the update.
        preserved_rank: k, below the smaller side of each adapted weight.
        preserved_rank_pattern: module name or regular expression -> k for these modules instead of preserved_rank.
        preserved_energy: choose k for each module, when the adapter is added, as the least that holds this share of the
            weight's squared singular values, instead of preserved_rank. Not stored in the file, whose
            preserved_rank_pattern has what was chosen.
        basis: as for PSOFT, of V_k; U_k follows from V_k and W.

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title, usual_learning_rate, alpha_option = "OPLoRA", 6e-4, "lora_alpha"
    asking = (*BasisConfig.asking, "preserved_energy")
    runtime_fields = (*BasisConfig.runtime_fields, "preserved_energy")
    size_pattern = ""  # its r is that of an update off the principal subspace, whose energy says nothing of it

    r: int = field(default=8)
    lora_alpha: float | None = field(default=None)
    lora_dropout: float = field(default=0.0)
    preserved_rank: int = field(default=16)
    preserved_rank_pattern: dict[str, int] = field(default_factory=dict)
    preserved_energy: float | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("lora_dropout", self.lora_dropout, below=1)
        require_positive_integer("preserved_rank", self.preserved_rank)
        share = self.preserved_energy
        fits = share is None or 0.0 < share < 1.0
        require(fits, "preserved_energy", share, "it must be between 0 and 1, or None")
        if share is not None and self.preserved_rank_pattern:
            raise ValueError(
                f"preserved_energy={share} chooses k for every module, but preserved_rank_pattern="
                f"{shown(self.preserved_rank_pattern)} is given too; leave one of them out."
            )

    def preserved_rank_of(self, module: str) -> int:
        """k of a module."""
        return int(by_pattern(self.preserved_rank_pattern, module, self.preserved_rank))

    def fit(self, module: str, shape: tuple[int, int], singular_values: Tensor) -> None:
        """Choose k for a module by preserved_energy; experts share the largest."""
        assert self.preserved_energy is not None
        k = max(rank_of_energy(own, self.preserved_energy) for own in singular_values)
        self.preserved_rank_pattern[exactly(module)] = k

    def build_basis(self, module: str, in_features: int, device: torch.device) -> SubspaceBasis:
        return self.basis_of_rank(self.preserved_rank_of(module), in_features, device)

    def build_operator(self, module: str, in_features: int, out_features: int) -> ComplementAdapter:
        """A new adapter, not placed yet.

        Raises:
            ValueError: k leaves no direction of the weight to train in.
        """
        k, limit = self.preserved_rank_of(module), min(in_features, out_features) - 1
        if k > limit:
            raise ValueError(
                f"preserved_rank={k} is too large for the module {module!r}, whose weight is {out_features} × "
                f"{in_features}: at most {limit} of its singular triplets can be preserved, since the update lies in "
                "the others. Choose a smaller preserved_rank or preserved_energy, give this module its own with "
                f"preserved_rank_pattern={{{module!r}: {limit}}}, or exclude it with exclude_modules."
            )
        adapter = self.scaled(module, ComplementAdapter(self.rank_of(module), in_features, out_features, k))
        adapter.dropout = self.lora_dropout
        return adapter
