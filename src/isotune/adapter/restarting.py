"""The form *restarting update*: W' = W + U D + s·(B A − B₀ A₀), a low-rank update whose factors start on a subspace."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from isotune.adapter.lowrank import PlacedLowRank
from isotune.adapter.placement import Factors, Placement, update_factors


class RestartingAdapter(PlacedLowRank):
    """Both factors of an update trained, A (r, in) and B (out, r), from a start on a subspace of the current weight.

    U D is what is accumulated on earlier subspaces, and W + U D the current weight. A method either *splits off* a part
    of it: with the basis V and σᵢ = ‖(W + U D) vᵢ‖ the start is A₀ = Σ V and B₀ = (W + U D) Vᵀ Σ⁻¹, so that
    B₀ A₀ = (W + U D) Vᵀ V, and the layer computes with W + U D − B₀ A₀ + B A. Or it adds B A to the current weight.

    The parameters are A and B themselves, as in the papers, so that weight decay draws them to zero and not to the
    start. But the update is evaluated from its differences from the start, by Down = [A; A − A₀] and Up = [B − B₀, B₀]:
    nothing cancels, and at the start it is zero to the bit.

    Args:
        size: r.
        in_features, out_features: of W.
    """

    evaluated = ("lora_A", "lora_B")
    starts_by_placement = True
    splits = False
    """Whether the placement is that of A₀ and B₀, and not of V and W Vᵀ."""
    subtracted = False
    """Whether B₀ A₀ is subtracted, for which the placement must be that of A₀ and B₀."""

    def __init__(self, size: int, in_features: int, out_features: int) -> None:
        super().__init__(size)
        self.lora_A = nn.Parameter(torch.zeros(size, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, size, dtype=torch.float32))

    @property
    def fixed(self) -> str | None:
        """None: it can always start anew."""
        return None

    @abstractmethod
    def start(self, placement: Placement, generator: torch.Generator) -> dict[str, Tensor]: ...

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Down and Up, with what is accumulated; the configured scale is in Up."""
        a, b = parameters["lora_A"], parameters["lora_B"]
        down, up = self.factors(a.dtype, a.device)
        if a.ndim > down.ndim:
            down, up = down[None], up[None]
        first, last = down[..., : self.size, :], up[..., : self.size]
        downs, ups = ([a, a - first], [b - last, last]) if self.subtracted else ([a], [b])
        if self.configured_scale != 1.0:
            ups = [one * self.configured_scale for one in ups]
        if self.accumulated_rank:
            downs.append(down[..., self.size :, :])
            ups.append(up[..., self.size :])
        # Copies, even of A alone: the owner of the parameters may take them away before the layer uses the factors.
        return torch.cat(downs, -2), torch.cat(ups, -1)

    def _scaled(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor times the current scale relative to the configured one, which what is accumulated does not have."""
        tensor = tensor.to(dtype)
        return tensor if self.relative_scale == 1.0 else tensor * self.relative_scale

    def batch_key(self) -> Hashable:
        """r, and the kind of start."""
        return self.size, self.splits, self.subtracted

    def factors_on(self, basis: Tensor, matrix: Tensor, accumulated: Factors | None) -> Factors:
        """A₀ and B₀, or V and (W + U D) Vᵀ, followed by what is accumulated."""
        down, up = update_factors(basis, matrix, 1.0 if self.splits else 0.0, accumulated)
        if self.splits:
            # Where σᵢ is exactly 0, as in a weight of zeros, any unit vector will do; with none nothing is learnt.
            own, more = up[..., : basis.shape[-2]], up[..., basis.shape[-2] :]
            up = torch.cat([torch.where(own.any(-2, keepdim=True), own, torch.linalg.qr(own).Q), more], -1)
        return down, up

    @property
    def placement_key(self) -> Hashable:
        """The rank, apart from other forms, and whether a part of the weight is split off."""
        return RestartingAdapter, self.size, self.splits

    def is_identity(self) -> bool:
        """Whether nothing is added to W."""
        return (self.subtracted or not self.splits) and self.is_untrained()

    def is_untrained(self) -> bool:
        """Whether A and B are where they started, or B A is zero, and nothing is accumulated."""
        a, b, placement = self.lora_A.detach(), self.lora_B.detach(), self.placement
        if self.accumulated_rank or placement is None or not self.splits:
            return not self.accumulated_rank and not (bool(a.any()) and bool(b.any()))
        starts = placement.down[..., : self.size, :], placement.up[..., : self.size]
        return all(torch.equal(one, start.to(one)) for one, start in zip((a, b), starts, strict=True))

    def kept(self, in_features: int) -> int:
        """The input, as for LoRA, and x Downᵀ."""
        return in_features + (2 if self.subtracted else 1) * self.size + self.accumulated_rank

    def spanning(self) -> Tensor:
        """A."""
        return self.lora_A.detach()
