"""What all forms of an update have in common: W' = W + s·ΔW, by itself or placed by a basis of its layer's weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import autocasts
from isotune.adapter.operator import Adapter
from isotune.adapter.placement import Placement


class Update(Adapter):
    """An adapter that adds an update of low rank to its layer's weight, times a scale s."""

    additive = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.configured_scale = self.scale = 1.0
        """s: as configured, and currently."""

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the update, with dropout in training."""
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def fits_one_node(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the layer and its update may be one node: not under autocast, with dropout, or in two dtypes."""
        return x.dtype == weight.dtype and not (self.dropout and self.training) and not autocasts(x)

    @property
    def has_low_rank(self) -> bool:
        """True: the update has rank r."""
        return True

    def set_scale(self, scale: float) -> None:
        """Multiply the configured scale of the update by `scale`; 0 gives the base's layer."""
        self.scale = self.configured_scale * scale

    @property
    def relative_scale(self) -> float:
        """The current scale divided by the configured one."""
        return self.scale / self.configured_scale


class PlacedUpdate(Update):
    """An update that depends on a basis V of singular vectors of its layer's weight."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.placement: Placement | None = None
        """Where the update acts; None until the adapter is placed."""

    @abstractmethod
    def placed(
        self,
        basis: Tensor,
        matrix: Tensor,
        stored: Sequence[Tensor],
        weight: Tensor,
        accumulated: tuple[Tensor, Tensor] | None = None,
    ) -> Placement:
        """What the update needs of a basis on a weight.

        Args:
            basis: V, (..., k, in), at least float32, with orthonormal rows.
            matrix: W, (..., out, in).
            stored: the stored buffers: the pin or V itself, one per expert.
            weight: the frozen parameter from which `matrix` was read.
            accumulated: U (out, k) and D (k, in) of an update from earlier subspaces; None if the form has none.
        """

    @property
    @abstractmethod
    def placement_key(self) -> Hashable:
        """Adapters on one layer with equal keys and equal stored bases have equal placements."""

    @property
    def basis_rank(self) -> int:
        """k, the number of vectors of the basis."""
        return self.size

    @property
    def accumulated_rank(self) -> int:
        """The rank of the update that is accumulated on earlier subspaces."""
        return 0 if self.placement is None else self.placement.accumulated

    @property
    def fixed(self) -> str | None:
        """Why its subspace cannot move in training, and what to do; None if it can."""
        return "its method has one subspace for good. Use PSOFT, LoRA-XS, SVFit, CERSA, ROSA or PESO."

    def start(self, placement: Placement, generator: torch.Generator) -> dict[str, Tensor]:
        """The values at which the parameters start on a new placement.

        Args:
            placement: the new one.
            generator: on the CPU, for what is drawn at random.
        """
        raise NotImplementedError

    def spanning(self) -> Tensor:
        """Rows, (r, in), that span the subspace in which the update acts now."""
        raise NotImplementedError

    def factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two frozen factors of the placement, down and up, in this dtype and on this device.

        Raises:
            ValueError: the adapter is not placed.
        """
        placement = self.placement
        if placement is None:
            raise ValueError(
                "The subspace of an adapter is not placed on its layer yet: call the whole model once instead of the "
                "layer alone, so that all subspaces are found on the base's weights."
            )
        down, up = placement.factors
        if down.dtype == dtype and down.device == device:
            return down, up
        return down.to(device, dtype), up.to(device, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PlacedUpdate:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.placement is not None:
            self.placement = self.placement.moved(fn)
        return self
