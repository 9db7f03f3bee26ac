"""CERSA (Ge et al., 2026, arXiv 2605.08174): a free matrix between the singular vectors that hold a weight's energy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from isotune.adapter.subspace import SubspaceAdapter
from isotune.adapter.update import PlacedUpdate
from isotune.algebra.means import linear_mean
from isotune.methods.checks import require, shown
from isotune.methods.config import by_pattern, exactly
from isotune.methods.subspace import SubspaceConfig
from isotune.subspace.energy import kept_shares, least_size

_TIE = 1e-5
"""Relative difference up to which two singular values count as one, since no solver tells their vectors apart."""


@dataclass
class CersaConfig(SubspaceConfig):
    """Configuration of CERSA: W' = W + U_r C V_rᵀ, of which only C (r × r) is trained, zero at the start.

    U_r S_r V_rᵀ is the truncated singular value decomposition of W. The paper trains a core that starts at S_r: this is
    S_r + C, so every step is the same. What it discards, the singular triplets above k, is kept here unless
    `truncate_base` asks for the paper's layer, W_k + U_r C V_rᵀ.

    Args:
        r: "auto", the method's own choice: each module's least rank that reaches rank_energy; or a number for all.
        rank_energy: the share of the energy within which the core is trained, the paper's β; None is 0.95 with
            r="auto", or base_energy if that is less.
        truncate_base: replace each adapted linear layer by its best approximation of rank k, held as its factors. This
            saves memory and changes the base model, before training and for good: see the method's page.
        base_energy: α, the share of the energy that W_k holds, at least rank_energy; k is the least such rank, and a
            layer whose factors would need more memory than its weight stays whole. None is 0.95 with truncate_base.
            Not stored in the file, whose base_rank_pattern has what was chosen.
        base_rank_pattern: module name or regular expression -> k, instead of base_energy.

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title, usual_learning_rate = "CERSA", 2e-3
    usual_energy: ClassVar[float] = 0.95
    asking = (*SubspaceConfig.asking, "base_energy")
    runtime_fields = (*SubspaceConfig.runtime_fields, "truncate_base", "base_energy")
    format_since = {**SubspaceConfig.format_since, "base_rank_pattern": 4}  # noqa: RUF012

    r: int | Literal["auto"] = field(default="auto")
    truncate_base: bool = field(default=False)
    base_energy: float | None = field(default=None)
    base_rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trained, share, pattern = self.rank_energy, self.base_energy, self.base_rank_pattern
        super().__post_init__()
        self.truncate_base |= bool(pattern) and "truncate_base" not in self.given  # a file has the numbers alone
        if not self.truncate_base and (share is not None or pattern):
            raise ValueError(
                f"base_energy={share} and base_rank_pattern={shown(pattern)} say how far the base is truncated, "
                "which truncate_base=False does not do; set truncate_base=True, or leave them out."
            )
        if pattern and (share is not None or self.accumulated_ranks):
            raise ValueError(
                f"base_rank_pattern={shown(pattern)} has no meaning with base_energy, which chooses k for every "
                "module, nor with accumulated_ranks, of subspaces that have moved; leave it or them out."
            )
        if not self.truncate_base or pattern:
            return
        share = self.base_energy = self.usual_energy if share is None else share
        require(0.0 < share <= 1.0, "base_energy", share, "it must be in (0, 1]")
        if self.rank_measure == "activations":
            raise ValueError('rank_measure="activations" has no meaning with base_energy; give base_rank_pattern.')
        if trained is None and self.rank_energy is not None:
            self.rank_energy = min(self.rank_energy, share)
        fits = self.rank_energy is None or self.rank_energy <= share
        require(fits, "rank_energy", self.rank_energy, f"with base_energy={share} it may be at most that")

    def base_rank(self, module: str) -> int | None:
        """k of a module; None if it stays whole."""
        return by_pattern(self.base_rank_pattern, module, None)  # type: ignore[no-any-return]

    def fit(self, module: str, shape: tuple[int, int], singular_values: Tensor) -> None:
        """Choose k for a module by base_energy, if the factors are then smaller than its weight."""
        assert self.base_energy is not None
        values = singular_values[0]
        kept = kept_shares(values if self.rank_measure == "values" else values.square())
        k = 1 + least_size(kept, self.base_energy)
        while k < len(values) and values[k] > (1.0 - _TIE) * values[k - 1]:
            k += 1
        if k * (sum(shape) + 1) < math.prod(shape):
            self.base_rank_pattern[exactly(module)] = k

    def build_operator(self, module: str, in_features: int, out_features: int) -> PlacedUpdate:
        """As for every method on subspaces; raises ValueError if k does not fit the weight or r, too."""
        rank, k, limit = self.rank_of(module), self.base_rank(module), min(in_features, out_features)
        if k is not None and k > limit:
            raise ValueError(
                f"k={k} is too large for the module {module!r}, whose weight of shape ({out_features}, {in_features}) "
                f"has {limit} directions. Choose a smaller one in base_rank_pattern, or leave the module out of it."
            )
        if k is not None and rank > k:
            raise ValueError(
                f"r={rank} is too large for the module {module!r}, of which truncate_base keeps k={k} directions. "
                "Choose a smaller r, rank_pattern, rank_energy or rank_budget, or keep more by base_energy or "
                "base_rank_pattern."
            )
        return super().build_operator(module, in_features, out_features)

    def subspace_operator(self, rank: int) -> CersaOperator:
        operator = CersaOperator(rank)
        operator.power = None
        return operator


class CersaOperator(SubspaceAdapter):
    """M = I + Cᵀ with the free matrix C, `core`, (r, r), of W' = W + U C Vᵀ.

    Operators act on row vectors, x ↦ x M, and the paper's core on columns, so M − I is the transpose of C.

    Args:
        size: r.
    """

    evaluated = ("core",)
    orthogonal = False
    averages = {"core": linear_mean}  # noqa: RUF012
    coordinates = {"core": "transposed"}  # noqa: RUF012
    needs_rows = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.core = nn.Parameter(torch.zeros(size, size, dtype=torch.float32))

    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """M − I = Cᵀ."""
        return parameters["core"].mT
