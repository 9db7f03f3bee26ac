"""Where a subspace update acts on one frozen layer: a value that is replaced as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import without_autocast
from isotune.internals.torch_state import is_symbolic, version_of
from isotune.subspace.precision import exact_product

_ALIGNMENT = 16
"""Products with tokens × r results run up to twice as fast on a CPU, and on GPUs too, if r is a multiple of this."""
_NEGLIGIBLE = 2e-6
"""Share of the largest singular value below which one is rounding, as for the solvers; coarser in half precision."""


Factors = tuple[Tensor, Tensor]
"""The two thin matrices of which an update is the product."""


def filling(rank: int) -> int:
    """The number of zero rows and columns that pad a rank to one at which matrix products are fast."""
    return 0 if rank < _ALIGNMENT else -rank % _ALIGNMENT


@dataclass(frozen=True)
class Mark:
    """A record by which replacing or writing to a tensor is noticed, as long as nothing has moved it."""

    tensor: int
    """The tensor's id."""
    version: int
    address: int
    sample: bytes
    """A value of each row of a tensor on a CPU, where reading them is cheap: writes to `tensor.data` leave no other
    trace, and are not noticed on other devices."""

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is still the marked tensor, and it has not been written to since."""
        if self.tensor != id(tensor) or self.version != version_of(tensor) or self.address != _address(tensor):
            return False
        return not self.sample or self.sample == _sample(tensor)

    @classmethod
    def of(cls, tensor: Tensor, *, sampled: bool = True) -> Mark:
        """The mark of a tensor in its current state."""
        return cls(id(tensor), version_of(tensor), _address(tensor), _sample(tensor) if sampled else b"")


def _address(tensor: Tensor) -> int:
    """The memory address of a tensor's values; 0 if it has none of its own."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta else 0


def _sample(tensor: Tensor) -> bytes:
    """At least one value of each row, in changing columns, of a tensor on a CPU; empty for any other."""
    if not _address(tensor) or tensor.device.type != "cpu" or not tensor.numel() or 0 in tensor.stride():
        return b""
    # Through the storage, as a transposed weight has no rows side by side; of a part of a larger tensor this reads
    # other values too, and a change of those is only one more comparison.
    step = max(1, tensor.numel() // len(tensor) - 1)
    values = tensor.detach().as_strided((-(-tensor.numel() // step),), (step,)).contiguous()
    return values.view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Placement:
    """The two factors of a subspace update on one weight W, and what they were made from.

    With the orthonormal basis V (r, in), σᵢ = ‖W vᵢ‖ and the method's power p: down = Σᵖ V, up = W Vᵀ Σ^(−p); without
    a power, down = V and up = W Vᵀ Σ⁻¹, the singular vectors alone, zero where σᵢ is rounding. Both have the dtype of W
    (in the form that leaves these directions alone, at least float32) and are padded with zeros to a rank at which
    matrix products are fast. For the experts of a mixture, all have one more leading dimension.

    If the adapter has accumulated an update U D on earlier subspaces, W + U D stands for W, and the rows of D and the
    columns of U follow those of the subspace.
    """

    down: Tensor
    """(r or more, in)."""
    up: Tensor
    """(out, r or more)."""
    stored: tuple[Tensor, ...]
    """Copies of the stored pins or bases, one per expert, by which a load is noticed."""
    pins: tuple[Mark, ...]
    """Marks of the stored buffers."""
    weight: Mark
    """Mark of the frozen weight from which `up` was made."""
    residual: float = 0.0
    """How far the weight is from the one the pin was made on."""
    is_principal: bool = False
    """Whether V is the principal basis, so that other adapters with equal options may share it."""
    accumulated: int = 0
    """The rank k of the accumulated update: how many rows of D and columns of U there are."""

    @property
    def factors(self) -> Factors:
        """down and up."""
        return self.down, self.up

    def moved(self, change: Callable[[Tensor], Tensor], *, narrow: bool) -> Placement | None:
        """The placement with its factors moved or cast; None if their values are lost, as on the meta device.

        Args:
            change: moves or casts one tensor.
            narrow: whether it may cast them to less than 32 bits; otherwise it then only moves them.
        """
        down, up = change(self.down), change(self.up)
        if down.is_meta != self.down.is_meta:
            return None
        if not (is_symbolic(down) or (_has_values_of(down, self.down) and _has_values_of(up, self.up))):
            return None  # to_empty leaves any numbers
        if down.itemsize < 4 and not narrow:
            down, up = (factor.to(down.device) for factor in self.factors)
        return replace(self, down=down, up=up)


def _has_values_of(changed: Tensor, tensor: Tensor) -> bool:
    return torch.equal(changed, tensor.to(changed.device, changed.dtype))


def left_vectors(product: Tensor, dtype: torch.dtype) -> Tensor:
    """The left singular vectors of W that belong to right ones, from W Vᵀ, orthonormal to rounding.

    Args:
        product: W Vᵀ, (..., out, k), at least float32.
        dtype: the dtype of W itself, to which its values are rounded.

    Returns:
        U, (..., out, k): W Vᵀ Σ⁻¹ where V holds singular vectors, else an orthonormal basis of the columns of W Vᵀ;
        zero where σᵢ is rounding, since no vector belongs to it.
    """
    # With R's diagonal made positive, Q changes as little as W Vᵀ does.
    left, upper = torch.linalg.qr(product)
    values = upper.diagonal(dim1=-2, dim2=-1)
    # Rounding errors are independent of each other, so their norm stays far below a quarter of the precision times σ₁,
    # whatever the size of W. A float64 copy of W is no more exact than V, which is found in float32.
    share = max(_NEGLIGIBLE, torch.finfo(dtype).eps / 4)
    signs = values.sign() * (values.abs() > share * values.abs().amax(-1, keepdim=True))
    found: Tensor = left * signs[..., None, :]
    return found


def update_factors(basis: Tensor, matrix: Tensor, power: float | None, accumulated: Factors | None = None) -> Factors:
    """Make the factors of an update for a basis on a weight, as `Placement` defines them but without zeros.

    Args:
        basis: V, (..., r, in), at least float32, with orthonormal rows.
        matrix: W, (..., out, in).
        power: p, how the singular values are split; None leaves them out of both factors.
        accumulated: U (out, k) and D (k, in) of an update W + U D from earlier subspaces; not for experts.

    Returns:
        down (..., r + k, in) and up (..., out, r + k), new tensors on the device of W, at least float32.

    Source: Wu et al., PSOFT (ICLR 2026), equations 6–8; Meng et al., PiSSA (2024), for the even split;
        Balazy et al., LoRA-XS (2024), for all singular values on the input side.
    """
    down = basis.to(device=matrix.device, dtype=torch.promote_types(matrix.dtype, torch.float32), copy=True)
    with without_autocast(matrix):
        up = exact_product(matrix.to(down.dtype), down.mT)
        if accumulated is not None:
            more_up, more_down = (factor.to(down) for factor in accumulated)
            up = up + exact_product(more_up, exact_product(more_down, down.mT))
    if power is None:
        up = left_vectors(up, matrix.dtype)
    elif power != 0.0:
        values = torch.linalg.vector_norm(up, dim=-2).clamp_min(torch.finfo(down.dtype).tiny).pow(power)
        down, up = down * values[..., :, None], up / values[..., None, :]
    if accumulated is not None:
        down, up = torch.cat([down, more_down]), torch.cat([up, more_up], dim=1)
    return down, up
