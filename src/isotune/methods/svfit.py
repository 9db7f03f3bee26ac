"""SVFit (Sun et al., 2024, arXiv 2409.05926): one trained factor for each chosen singular value of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from isotune.adapter.subspace import SubspaceAdapter
from isotune.algebra.means import linear_mean
from isotune.methods.subspace import SubspaceConfig


@dataclass
class SvfitConfig(SubspaceConfig):
    """Configuration of SVFit: W' = W + U_r diag(σ ⊙ d) V_rᵀ, so that the singular value σᵢ becomes σᵢ (1 + dᵢ).

    Args:
        selection: which r singular directions of each weight: the "top", the "bottom", or "mixed", half from each end.

    Raises:
        ValueError: a value is not allowed or has no effect; the message says what to change.
    """

    title, usual_learning_rate = "SVFit", 5e-3

    selection: Literal["top", "bottom", "mixed"] = field(default="top")

    def subspace_operator(self, rank: int) -> SvfitOperator:
        return SvfitOperator(rank)


class SvfitOperator(SubspaceAdapter):
    """M = I + diag(d) with the trained `stretch` d, (r,).

    Args:
        size: r.
    """

    evaluated = ("stretch",)
    orthogonal = False
    averages = {"stretch": linear_mean}  # noqa: RUF012

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.stretch = nn.Parameter(torch.zeros(size, dtype=torch.float32))

    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """M − I = diag(d)."""
        return parameters["stretch"].diag_embed()
