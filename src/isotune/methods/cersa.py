"""CERSA (Ge et al., 2026, arXiv 2605.08174): a free matrix between the singular vectors that hold a weight's energy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from isotune.adapter.subspace import SubspaceAdapter
from isotune.algebra.means import linear_mean
from isotune.methods.subspace import SubspaceConfig


@dataclass
class CersaConfig(SubspaceConfig):
    """Configuration of CERSA: W' = W + U_r C V_rᵀ, of which only C (r × r) is trained, zero at the start.

    U_r S_r V_rᵀ is the truncated singular value decomposition of W. The paper trains a core that starts at S_r: this is
    S_r + C, so every step is the same. What it discards, the rest of the decomposition, is kept here.

    Args:
        r: "auto", the method's own choice: each module's least rank that reaches rank_energy; or a number for all.
        rank_energy: the share of the energy within which the core is trained, the paper's β; None is 0.95 with
            r="auto".

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title, usual_learning_rate = "CERSA", 2e-3
    usual_energy: ClassVar[float] = 0.95

    r: int | Literal["auto"] = field(default="auto")

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

    def batch_key(self) -> Hashable:
        return self.size

    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """M − I = Cᵀ."""
        return parameters["core"].mT
