"""PESO-LoRA (Lou, Ye and Chen, 2025, arXiv 2512.02216): LoRA in a subspace that is chosen again every few steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from isotune.adapter.placement import Placement
from isotune.adapter.restarting import RestartingAdapter
from isotune.methods.subspace import RestartingConfig


@dataclass
class PesoConfig(RestartingConfig):
    """Configuration of PESO-LoRA: W' = W + (lora_alpha / r)·B A, with A an orthonormal basis and B = 0 at each start.

    With a `MovingSchedule(every=K)` it folds B A into the anchored weight every K steps and starts again: with
    select="gradient" on the singular vectors of the full gradient (PESO-LoRA-R), with select="warm" where it is (what
    is made of PESO-LoRA-T here). Only the framework is public; docs/methods/peso.md says what is not.

    Args:
        r: rank of B A.
        lora_alpha: the update is scaled by lora_alpha / r; None means r.

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title, usual_learning_rate, alpha_option = "PESO", 6e-4, "lora_alpha"

    lora_alpha: float | None = field(default=None)

    def update_of(self, rank: int, in_features: int, out_features: int) -> PesoAdapter:
        return PesoAdapter(rank, in_features, out_features)


class PesoAdapter(RestartingAdapter):
    """A from an orthonormal basis V of a subspace of the inputs, and B from zero."""

    def start(self, placement: Placement, generator: torch.Generator) -> dict[str, Tensor]:
        """A = V and B = 0."""
        return {"lora_A": placement.down[..., : self.size, :], "lora_B": torch.zeros_like(self.lora_B)}
