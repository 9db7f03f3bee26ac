"""The base class of configurations of methods that depend on the singular vectors of each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from isotune.adapter.operator import Adapter
from isotune.adapter.subspace import SubspaceBasis
from isotune.adapter.update import PlacedUpdate
from isotune.methods.checks import require_positive_integer, require_seed, shown
from isotune.methods.config import IsotuneConfig, by_pattern
from isotune.methods.sizes import check_choice
from isotune.subspace.pinning import pin_width
from isotune.subspace.selection import chosen

_Update = TypeVar("_Update", bound=PlacedUpdate)


@dataclass
class BasisConfig(IsotuneConfig):
    """Fields shared by the methods whose updates depend on the strongest singular vectors of each weight.

    Args:
        r: rank of the principal subspace; at most the smaller side of each adapted weight. "auto" chooses one for each
            module when an adapter is made, by rank_energy or rank_budget; the file then has the numbers.
        rank_energy: share of each weight's energy that its rank has to reach, in (0, 1]; None is 0.9 with r="auto"
            and no rank_budget. Not stored in the file.
        rank_measure: what energy is: "squares" of the singular values, their "values", or that of the outputs on some
            data, "activations", which recipes have and `isotune.choose_ranks` is given. Not stored in the file.
        rank_pattern: module name or regular expression -> rank for these modules instead of r.
        alpha_pattern: module name or regular expression -> alpha for these modules instead of the method's own; refused
            where it has none.
        basis: "pinned" stores just enough to find the subspace again on the same base model, which is checked on
            loading (small); "embedded" stores the subspace itself (larger, exact on any base model).
        basis_seed: seed of the fixed Gaussian matrix of the pin.
        on_base_mismatch: "error" refuses to load a pinned adapter on another base model than it was trained on,
            "warn" loads it anyway. Not stored in the file.
        subspace_cache: whether to cache computed subspaces on disk (see ISOTUNE_CACHE). Not stored in the file.
    """

    runtime_fields: ClassVar[tuple[str, ...]] = (
        *IsotuneConfig.runtime_fields,
        *("rank_energy", "rank_measure", "on_base_mismatch", "subspace_cache"),
    )
    size_names, size_pattern = {"r": "r"}, "rank_pattern"
    usual_energy: ClassVar[float] = 0.9
    """rank_energy with r="auto": the lower end of the shares for which CERSA (arXiv 2605.08174) reports results."""
    alpha_option: ClassVar[str] = ""
    """Name of the method's alpha; the update is scaled by alpha / r, and None means r."""

    r: int | Literal["auto"] = field(default=32)
    rank_energy: float | None = field(default=None)
    rank_measure: Literal["squares", "values", "activations"] = field(default="squares")
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    basis: Literal["pinned", "embedded"] = field(default="pinned")
    basis_seed: int = field(default=0)
    on_base_mismatch: Literal["error", "warn"] = field(default="error")
    subspace_cache: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha_pattern and not self.alpha_option:
            raise ValueError(
                f"alpha_pattern={shown(self.alpha_pattern)} has no meaning with {type(self).__name__}, whose update "
                "has no alpha; leave it out."
            )
        if self.r == "auto" and self.rank_budget is None and self.rank_energy is None:
            self.rank_energy = self.usual_energy
        if self.chooses_sizes:
            check_choice(self, self._alpha)
            self.r = "auto"
        else:
            require_positive_integer("r", self.r)
        require_seed("basis_seed", self.basis_seed)
        name, alphas = self.alpha_option, (self._alpha, *self.alpha_pattern.values())
        if name and not all(alpha is None or 0 < alpha < float("inf") for alpha in alphas):
            raise ValueError(
                f"{name}={self._alpha!r} with alpha_pattern={shown(self.alpha_pattern)} is not allowed; each alpha "
                f"must be above 0 and finite, or {name} may be None, which means r."
            )

    @property
    def _alpha(self) -> float | None:
        return getattr(self, self.alpha_option) if self.alpha_option else None

    @property
    def solver(self) -> str:
        """The solver that finds the subspaces: "auto", "full" or "lowrank"."""
        return "auto"

    @property
    def selection(self) -> str:
        """Which singular directions of each weight are adapted, as in `isotune.subspace.selection.chosen`."""
        return "top"

    def directions(self, module: str, count: int, rank: int) -> Tensor:
        """The places of a module's singular directions among all n, (r,), as `chosen` gives them."""
        return chosen(count, rank, self.selection)

    def rank_of(self, module: str) -> int:
        """The rank of a module: from `rank_pattern`, or else r.

        Examples:
            >>> from isotune import PsoftConfig
            >>> PsoftConfig(r=8, rank_pattern={"q_proj": 4}).rank_of("layers.0.q_proj")
            4
        """
        rank = by_pattern(self.rank_pattern, module, self.r)
        if rank == "auto":
            raise ValueError(
                'r="auto" has no rank yet: ranks are chosen when get_peft_model makes an adapter of this configuration.'
            )
        return int(rank)

    def scale_of(self, module: str) -> float:
        """The factor s of a module's update: alpha / r, each from its pattern if it names the module."""
        alpha = by_pattern(self.alpha_pattern, module, self._alpha)
        return 1.0 if alpha is None else float(alpha) / self.rank_of(module)

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> Adapter:
        """As `build_operator`, from the shapes of two trained factors."""
        return self.build_operator(module, tensors["lora_A"].shape[1], tensors["lora_B"].shape[0])

    def scaled(self, module: str, adapter: _Update) -> _Update:
        """The same adapter with a module's scale."""
        adapter.configured_scale = adapter.scale = self.scale_of(module)
        return adapter

    def build_basis(self, module: str, in_features: int, device: torch.device) -> SubspaceBasis:
        """The pin or the basis of a module's subspace, still empty."""
        return self.basis_of_rank(self.rank_of(module), in_features, device)

    def basis_of_rank(self, rank: int, in_features: int, device: torch.device) -> SubspaceBasis:
        """The pin or the basis of a subspace of this rank, still empty."""
        width = pin_width(rank, in_features) if self.basis == "pinned" else None
        return SubspaceBasis(rank, in_features, width, device)
