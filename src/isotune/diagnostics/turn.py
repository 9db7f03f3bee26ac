"""Measurements of one adapted layer that `isotune inspect` and the records of runs share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from isotune.adapter.operator import Adapter, Operator
from isotune.adapter.rotation import RotationAdapter
from isotune.adapter.subspace import SubspaceAdapter
from isotune.algebra.factors import BlockDiagonal, LowRank
from isotune.diagnostics import geometry
from isotune.tuner.layer import Layer

MAX_DENSE = 1536
"""Largest width n at which decomposing one n × n matrix per layer is still quick."""


class Turn(NamedTuple):
    """How an operator rotates its space."""

    orthogonality_error: float | None
    """Largest entry of |RᵀR − I|; large by design for a free matrix or RoAd, None for an update without an operator."""
    angles: Tensor | None
    """(n,), float64, radians, largest first; None for a free matrix, without one, or if it would take too long.

    The arguments of the eigenvalues of R, which a common scale of a plane does not change.
    """


@torch.no_grad()
def turn(operator: Adapter, *, max_dense: int = MAX_DENSE) -> Turn:
    """The orthogonality error and the rotation angles of an operator, without scaling vectors that stand apart from it.

    RoAd's scales do not: they are part of its 2 × 2 blocks, and so of the error.

    Args:
        operator: an operator on a subspace, or on all inputs or outputs; any other adapter turns nothing.
        max_dense: largest n at which a chain of factors is multiplied out to find its angles.
    """
    if not isinstance(operator, Operator):
        return Turn(None, None)
    if isinstance(operator, SubspaceAdapter):
        generator = getattr(operator, "generator", None)
        matrix = (
            operator.matrix() if generator is None else _plus_identity(operator.difference_of({"generator": generator}))
        )
        known = operator.orthogonal
    else:
        assert isinstance(operator, RotationAdapter)
        kinds, tensors = [type(factor) for factor in operator.chain], operator.chain_tensors()
        if kinds == [LowRank]:
            # I + L R has the eigenvalues of I + R L, and 1 otherwise.
            angles = geometry.rotation_angles(_plus_identity((tensors[1] @ tensors[0]).double()))
            angles = nn.functional.pad(angles, (0, max(0, operator.size - len(angles))))
            return Turn(geometry.orthogonality_error(operator.matrix()), angles)
        blocks = kinds == [BlockDiagonal]
        matrix = _plus_identity(tensors[0].double()) if blocks else operator.matrix()
        known = blocks or operator.size <= max_dense
    return Turn(geometry.orthogonality_error(matrix), geometry.rotation_angles(matrix) if known else None)


def _plus_identity(difference: Tensor) -> Tensor:
    return difference + torch.eye(difference.shape[-1], dtype=difference.dtype, device=difference.device)


@torch.no_grad()
def turned_weights(layer: Layer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """The weight whose rows a method rotates, before and after, at least float32.

    Args:
        layer: a layer of a model.
        adapter_name: one of its adapters.

    Returns:
        For an operator on a subspace, the principal weight P = W Vᵀ in the subspace's coordinates, (out, r) each, with
        what is accumulated on earlier subspaces in W; for a rotation of all outputs, Wᵀ; for anything else W, (out, in)
        each. The angles between rows and the norms of rows are those of P V, W or Wᵀ.
    """
    weight, adapter = layer.unmerged_matrix().float(), layer.adapter(adapter_name)
    if not adapter.principal:
        turned = layer.fold([adapter_name], weight)
        return (weight.mT, turned.mT) if adapter.side == "output" else (weight, turned)
    up, down = layer.low_rank(adapter_name)
    up, down, size = up.float(), down.float(), layer.adapter(adapter_name).size
    basis = basis_of(down[:size])
    principal = weight @ basis.T + up[:, size:] @ (down[size:] @ basis.T)
    return principal, principal + up[:, :size] @ (down[:size] @ basis.T)


def basis_of(down: Tensor) -> Tensor:
    """V (r, in) with orthonormal rows, float32, from an update's down factor, which may include singular values."""
    return nn.functional.normalize(down.float(), dim=1)
