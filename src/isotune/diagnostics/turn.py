"""What `isotune inspect` and the record of a run both measure of one adapted layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from isotune.adapter.operator import Adapter
from isotune.adapter.rotation import RotationAdapter
from isotune.algebra.factors import BlockDiagonal, LowRank
from isotune.diagnostics import geometry
from isotune.tuner.layer import Layer

MAX_DENSE = 1536
"""Largest width at which a decomposition of an n × n matrix for each layer is still quick."""


class Turn(NamedTuple):
    """How an operator turns its space."""

    orthogonality_error: float
    """Largest entry of |RᵀR − I|; large on purpose for a free matrix."""
    angles: Tensor | None
    """(n,), float64, radians, largest first; None for a free matrix and where it would take too long."""


@torch.no_grad()
def turn(operator: Adapter, *, max_dense: int = MAX_DENSE) -> Turn:
    """The orthogonality error and the rotation angles of an operator, without the vectors that scale it.

    Args:
        operator: of a subspace or of all inputs.
        max_dense: above this n a chain of factors that must be multiplied out to find its angles gets none.
    """
    if isinstance(operator, RotationAdapter):
        return _turn_of_chain(operator, max_dense)
    rotation, generator = operator.matrix(), getattr(operator, "generator", None)
    if generator is not None:
        (difference,) = operator.evaluate({"generator": generator})
        rotation = difference + torch.eye(operator.size, dtype=difference.dtype, device=difference.device)
    angles = geometry.rotation_angles(rotation) if operator.orthogonal else None
    return Turn(geometry.orthogonality_error(rotation), angles)


def _turn_of_chain(operator: RotationAdapter, max_dense: int) -> Turn:
    kinds, tensors = [type(factor) for factor in operator.chain], operator.chain_tensors()
    if kinds == [BlockDiagonal]:
        blocks = tensors[0].double()
        blocks = blocks + torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        angles = torch.linalg.eigvals(blocks).angle().abs().flatten()
        return Turn(max(map(geometry.orthogonality_error, blocks)), angles.sort(descending=True).values)
    if kinds == [LowRank]:
        # I + L R has the eigenvalues of I + R L, and 1 otherwise.
        small = (tensors[1] @ tensors[0]).double()
        eye = torch.eye(len(small), dtype=small.dtype, device=small.device)
        angles = torch.linalg.eigvals(small + eye).angle().abs().sort(descending=True).values
        angles = nn.functional.pad(angles, (0, max(0, operator.size - len(angles))))
        return Turn(geometry.orthogonality_error(operator.matrix()), angles)
    matrix = operator.matrix()
    return Turn(
        geometry.orthogonality_error(matrix),
        geometry.rotation_angles(matrix) if operator.size <= max_dense else None,
    )


@torch.no_grad()
def turned_weights(layer: Layer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """The weight whose rows a method turns, before and after, float32 at least.

    Args:
        layer: of a model.
        adapter_name: one of its adapters.

    Returns:
        The principal weight P = W Vᵀ in the coordinates of its subspace, (out, r) each, or W under a rotation of all
        inputs, (out, in) each. Angles between rows and norms of rows are those of P V and of W.
    """
    weight = layer.unmerged_matrix().float()
    if not layer.adapter(adapter_name).additive:
        return weight, layer.fold([adapter_name], weight)
    up, down = layer.low_rank(adapter_name)
    basis = basis_of(down)
    principal = weight @ basis.T
    return principal, principal + up.float() @ (down.float() @ basis.T)


def basis_of(down: Tensor) -> Tensor:
    """V (r, in) with orthonormal rows, float32, from the down factor of an update, which may carry singular values."""
    return nn.functional.normalize(down.float(), dim=1)
