"""LoRA-XS (Bałazy et al., ECAI 2025, arXiv 2405.17604): a free r × r matrix between frozen singular vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isotune.adapter.subspace import SubspaceAdapter
from isotune.algebra.means import linear_mean
from isotune.methods.checks import require_number
from isotune.methods.subspace import SubspaceConfig

_START = 8.0
"""Standard deviations beyond which normal samples practically never lie: about one in 10¹⁵."""


@dataclass
class LoraXsConfig(SubspaceConfig):
    """Configuration of LoRA-XS: W' = W + (lora_alpha / r)·U_r R S_r V_rᵀ, of which only R (r × r) is trained.

    U_r S_r V_rᵀ is the truncated singular value decomposition of W. As in the paper, the singular values belong to the
    input side: A = S_r V_rᵀ, B = U_r.

    Args:
        lora_alpha: the update is scaled by lora_alpha / r; None means r.
        init_std: standard deviation of R at the start. With the paper's 1e-5 the output first differs from the base
            model's by about that much, relative to its size; with 0 the two are equal bit for bit.
        init_weights: True draws R from N(0, init_std²); False draws an R as large as a trained one, for tests.

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title, usual_learning_rate, alpha_option = "LoRA-XS", 2e-3, "lora_alpha"

    lora_alpha: float | None = field(default=None)
    init_std: float = field(default=1e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("init_std", self.init_std)

    def subspace_operator(self, rank: int) -> LoraXsOperator:
        operator = LoraXsOperator(rank, self.init_std)
        operator.power = 1.0
        return operator


class LoraXsOperator(SubspaceAdapter):
    """M = I + Rᵀ with the free matrix R, `coefficients`, (r, r), of W' = W + s·U R S Vᵀ.

    Operators act on row vectors, x ↦ x M, and the paper's R acts on columns, so M − I is the transpose of R.

    Args:
        size: r.
        std: standard deviation of R at the start.
    """

    evaluated = ("coefficients",)
    orthogonal = False
    averages = {"coefficients": linear_mean}  # noqa: RUF012
    coordinates = {"coefficients": "transposed"}  # noqa: RUF012

    def __init__(self, size: int, std: float = 1e-5) -> None:
        super().__init__(size)
        self.std = std
        self.coefficients = nn.Parameter(std * torch.randn(size, size, dtype=torch.float32))

    def is_untrained(self) -> bool:
        """Whether R is still as small as at the start, and nothing is accumulated."""
        return not self.accumulated_rank and bool((self.coefficients.detach().abs() <= _START * self.std).all())

    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """M − I = Rᵀ."""
        return parameters["coefficients"].mT
