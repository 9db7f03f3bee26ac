"""PSOFT (Wu et al., ICLR 2026, arXiv 2505.11235): a rotation of the principal subspace, scaled by two vectors."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isotune.adapter.subspace import SubspaceAdapter
from isotune.algebra.cayley import CayleyMap
from isotune.algebra.diagonal import scaled_difference
from isotune.algebra.means import generator_means, linear_mean
from isotune.algebra.skew import skew_size
from isotune.errors import IsotuneWarning
from isotune.methods.checks import require, require_number, require_positive_integer
from isotune.methods.subspace import SubspaceConfig


@dataclass
class PsoftConfig(SubspaceConfig):
    """Configuration of PSOFT: y = host(x) + (psoft_alpha / r)·((x Vᵀ)(M − I)) Pᵀ with M = diag(α) R diag(β).

    Args:
        psoft_alpha: the update is scaled by psoft_alpha / r; None means r, and only then are the angles and norms of
            the principal weights strictly preserved.
        psoft_dropout: dropout on the input of the update.
        ab_svd_init: "psoft_init" projects the input with the orthonormal rows of V; "pissa_init" splits the singular
            values evenly between the two factors, which preserves no angles.
        psoft_svd: "full" is exact, "lowrank" iterates until it converges, "auto" takes the cheaper for each weight.
        psoft_svd_lowrank_niter, random_seed: accepted so that PEFT's configurations run, and ignored, since "lowrank"
            iterates until it converges, from a fixed start. Not stored in the file.
        psoft_orth: make R orthogonal by the Cayley transform; False trains a free r × r matrix.
        psoft_mag_a: train α, on the input side.
        psoft_mag_b: train β, on the output side; without both, the method is PSOFT-SO.
        use_cayley_neumann: use the truncated Neumann series instead of the exact Cayley transform.
        num_cayley_neumann_terms: highest power of the series; more terms come closer to the exact transform.
        cayley_neumann_eps: bound in (0, 1) on the Frobenius norm of the generator; needs use_cayley_neumann.
        scaled_generator: make Q of the trained entries divided by 2 √(r − 1), so that one learning rate serves more
            ranks; the rate is then larger by about that factor.

    Raises:
        ValueError: a value is not allowed or a combination has no effect; the message says what to change.
    """

    runtime_fields = (*SubspaceConfig.runtime_fields, "psoft_svd_lowrank_niter", "random_seed")
    title, usual_learning_rate, alpha_option = "PSOFT", 8e-4, "psoft_alpha"
    scaled_learning_rate = 5e-3
    format_since = {**SubspaceConfig.format_since, "scaled_generator": 3}  # noqa: RUF012
    presets = {"psoft_so": ("PSOFT-SO", {"psoft_mag_a": False, "psoft_mag_b": False})}  # noqa: RUF012

    psoft_alpha: float | None = field(default=None)
    psoft_dropout: float = field(default=0.0)
    ab_svd_init: Literal["psoft_init", "pissa_init"] = field(default="psoft_init")
    psoft_svd: Literal["auto", "full", "lowrank"] = field(default="auto")
    psoft_svd_lowrank_niter: int | None = field(default=None)
    random_seed: int = field(default=0)
    psoft_orth: bool = field(default=True)
    psoft_mag_a: bool = field(default=True)
    psoft_mag_b: bool = field(default=True)
    use_cayley_neumann: bool = field(default=False)
    num_cayley_neumann_terms: int = field(default=5)
    cayley_neumann_eps: float | None = field(default=None)
    scaled_generator: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("psoft_dropout", self.psoft_dropout, below=1)
        require_number("psoft_svd_lowrank_niter", self.psoft_svd_lowrank_niter or 0)
        require_number("random_seed", self.random_seed)
        for name in ("use_cayley_neumann", "scaled_generator"):
            if getattr(self, name) and not self.psoft_orth:
                raise ValueError(f"{name}=True has no effect with psoft_orth=False; change one of them.")
        require_positive_integer("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        if (bound := self.cayley_neumann_eps) is not None:
            if not self.use_cayley_neumann:
                raise ValueError(
                    "cayley_neumann_eps bounds the generator of the Neumann series and has no effect with "
                    "use_cayley_neumann=False; leave it None or set use_cayley_neumann=True."
                )
            require(0.0 < bound < 1.0, "cayley_neumann_eps", bound, "it must be between 0 and 1, where it converges")
        if self.psoft_orth and any(self.scale_of(key) != 1.0 for key in ("", *self.alpha_pattern, *self.rank_pattern)):
            message = "psoft_alpha differs from r, so angles and norms of the principal weights are not strictly kept."
            warnings.warn(f"{message} Leave it at None for the strict method.", IsotuneWarning, stacklevel=3)

    @property
    def solver(self) -> str:
        return self.psoft_svd

    def subspace_operator(self, rank: int) -> PsoftOperator:
        operator = PsoftOperator(
            rank,
            orthogonal=self.psoft_orth,
            input_scale=self.psoft_mag_a,
            output_scale=self.psoft_mag_b,
            neumann_terms=self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
            generator_bound=self.cayley_neumann_eps,
            scaled=self.scaled_generator,
        )
        operator.dropout, operator.power = self.psoft_dropout, 0.5 if self.ab_svd_init == "pissa_init" else 0.0
        return operator


class PsoftOperator(SubspaceAdapter):
    """M = diag(α) R diag(β), R the Cayley transform of a skew-symmetric generator, or a free matrix.

    Args:
        size: r.
        orthogonal: whether R is orthogonal; False trains R − I itself, (r, r).
        input_scale, output_scale: whether to train α and β, (r,) each.
        cayley: neumann_terms, generator_bound and scaled, as in `isotune.algebra.cayley.CayleyMap`.
    """

    evaluated = ("generator", "input_scale", "output_scale")
    near_one = ("input_scale", "output_scale")

    def __init__(
        self, size: int, *, orthogonal: bool = True, input_scale: bool = True, output_scale: bool = True, **cayley: Any
    ) -> None:
        super().__init__(size)
        self.orthogonal, self.cayley = orthogonal, CayleyMap(size, **cayley)
        scales = ("input_scale", "output_scale")
        self.averages = generator_means(self.cayley, *scales) if orthogonal else {"generator": linear_mean}
        self.coordinates = {"generator": "skew"} if orthogonal else {}
        entries = skew_size(size) if orthogonal else (size, size)
        self.generator = nn.Parameter(torch.zeros(entries, dtype=torch.float32))
        self.input_scale = nn.Parameter(torch.ones(size, dtype=torch.float32)) if input_scale else None
        self.output_scale = nn.Parameter(torch.ones(size, dtype=torch.float32)) if output_scale else None

    def batch_key(self) -> Hashable:
        return self.orthogonal, self.cayley

    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """M − I = diag(α)(R − I)diag(β) + diag(αβ − 1)."""
        difference = parameters["generator"]
        if self.orthogonal:
            difference = self.cayley.difference(difference)
        if "input_scale" not in parameters and "output_scale" not in parameters:
            return difference
        ones = difference.new_ones(difference.shape[:-1])
        scales = (parameters.get(name, ones) for name in ("input_scale", "output_scale"))
        return scaled_difference(difference, *scales)
