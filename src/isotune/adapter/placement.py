"""Where a subspace update acts on one frozen layer: a value made by one function, and exchanged whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import without_autocast
from isotune.internals.torch_state import version_of
from isotune.subspace.precision import exact_product

_ALIGNMENT = 16
"""Products with tokens × r results run up to twice as fast on a CPU, and on GPUs too, if r is a multiple of this."""
_SAMPLES = 32


def filling(rank: int) -> int:
    """How many rows and columns of zeros fill a rank up to one that matrix products like."""
    return 0 if rank < _ALIGNMENT else -rank % _ALIGNMENT


@dataclass(frozen=True)
class Mark:
    """What tells that a tensor was replaced or written to, for as long as nothing has moved it."""

    tensor: int
    """Its identity."""
    version: int
    address: int
    sample: tuple[float, ...]
    """Some of its numbers, of one on a CPU, where a look costs nothing: `tensor.data` leaves no other trace."""

    def is_of(self, tensor: Tensor) -> bool:
        """Whether nobody has replaced the tensor or written to it since."""
        if self.tensor != id(tensor) or self.version != version_of(tensor) or self.address != _address(tensor):
            return False
        return not self.sample or self.sample == _sample(tensor)

    @classmethod
    def of(cls, tensor: Tensor, *, sampled: bool = True) -> Mark:
        """The mark of a tensor now."""
        return cls(id(tensor), version_of(tensor), _address(tensor), _sample(tensor) if sampled else ())


def _address(tensor: Tensor) -> int:
    """Where the numbers of a tensor lie; 0 for one that has none of its own."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta else 0


def _sample(tensor: Tensor) -> tuple[float, ...]:
    """Some numbers of a tensor that is on a CPU and has them."""
    if not _address(tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return ()
    flat = tensor.detach().view(-1)
    return tuple(flat[:: max(1, len(flat) // _SAMPLES)].tolist())


@dataclass(frozen=True)
class Placement:
    """The two factors of a subspace update on one weight W, and what they were made from.

    With V (r, in) the orthonormal basis, σᵢ = ‖W vᵢ‖ and p the power of the method: down = Σᵖ V, up = W Vᵀ Σ^(−p).
    Both are in the dtype of W, and filled up with zeros to a rank that matrix products like. For the experts of a
    mixture, all have one more dimension in front.
    """

    down: Tensor
    """(r or more, in)."""
    up: Tensor
    """(out, r or more)."""
    stored: tuple[Tensor, ...]
    """Copies of the pins or bases that the file holds, one for each expert, by which a load is noticed."""
    pins: tuple[Mark, ...]
    weight: Mark
    """Of the frozen weight that `up` was made with."""
    residual: float = 0.0
    """How far the weight is from the one that the pin was made on."""
    is_principal: bool = False
    """Whether V was solved or taken over here, so that other adapters of equal options may take it."""

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """down and up."""
        return self.down, self.up

    def marked(self, pins: tuple[Mark, ...], weight: Mark) -> Placement:
        """The same, of tensors that have moved without a change."""
        return replace(self, pins=pins, weight=weight)

    def moved(self, change: Callable[[Tensor], Tensor]) -> Placement | None:
        """With the factors moved or cast; None if they have no values then, or get some that they had not."""
        down, up = change(self.down), change(self.up)
        return None if down.is_meta != self.down.is_meta else replace(self, down=down, up=up)


def place(
    basis: Tensor,
    matrix: Tensor,
    stored: Sequence[Tensor],
    weight: Tensor,
    *,
    power: float,
    residual: float = 0.0,
    principal: bool = False,
) -> Placement:
    """Make the factors of an update for a basis on a weight.

    Args:
        basis: V, (..., r, in), float32 or wider, orthonormal rows.
        matrix: W, (..., out, in); its dtype and device become those of the factors.
        stored: the buffers that the file holds: the pin or V itself, one for each expert.
        weight: the frozen parameter that `matrix` was read from.
        power: p, how the singular values are split.
        residual, principal: as in `Placement`.

    Returns:
        The placement.

    Source: Wu et al., PSOFT (ICLR 2026), equations 6–8; Meng et al., PiSSA (2024), for the even split;
        Balazy et al., LoRA-XS (2024), for all of them on the side of the input.
    """
    basis = basis.to(device=matrix.device, dtype=torch.promote_types(matrix.dtype, torch.float32))
    with without_autocast(matrix):
        up, down = exact_product(matrix.to(basis.dtype), basis.mT), basis
    if power:
        values = torch.linalg.vector_norm(up, dim=-2).clamp_min(torch.finfo(basis.dtype).tiny).pow(power)
        down, up = basis * values[..., :, None], up / values[..., None, :]
    zeros = filling(basis.shape[-2])
    return Placement(
        nn.functional.pad(down.to(matrix), (0, 0, 0, zeros)).contiguous(),
        nn.functional.pad(up.to(matrix), (0, zeros)).contiguous(),
        tuple(buffer.detach().clone() for buffer in stored),
        tuple(Mark.of(buffer, sampled=False) for buffer in stored),
        Mark.of(weight),
        residual,
        principal,
    )
