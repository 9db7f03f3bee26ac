"""What becomes of an optimiser's state when the subspace under its parameters moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.subspace import SubspaceAdapter
from isotune.algebra.skew import skew_from_vector, vector_from_skew

STATES = ("reset", "keep", "project")

_FIRST = ("exp_avg", "momentum_buffer")
"""Moments that are linear in the gradient, in torch's optimisers."""
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
"""Moments that are sums of squares of its entries."""


@dataclass(frozen=True)
class Overlap:
    """How the coordinates of a subspace become those of the next: C = V' Vᵀ, and with the singular values on each side.

    With down = Σᵖ V and up = P Σ⁻ᵖ a gradient with respect to M − I, N, is Σᵖ V G Vᵀ Σ⁻ᵖ for one G of the whole space;
    so in the next subspace it is left N rightᵀ, as far as G lies in the former one.
    """

    cosines: Tensor
    """C, (r, r)."""
    left: Tensor
    """Σ'ᵖ C Σ⁻ᵖ."""
    right: Tensor
    """Σ'⁻ᵖ C Σᵖ; U'ᵀ U if neither side has the singular values."""

    @classmethod
    def of(cls, before: Tensor, after: Tensor, ups: tuple[Tensor, Tensor] | None = None) -> Overlap:
        """The overlap of two down factors, Σᵖ V and Σ'ᵖ V' (r, in), in float64.

        Args:
            before, after: the down factors.
            ups: for an operator between singular vectors alone, U and U', (out, r): their overlap is `right` then.
        """
        old, new = before.double(), after.double()
        old_values, new_values = (torch.linalg.vector_norm(one, dim=1) for one in (old, new))
        cosines = (new / new_values[:, None]) @ (old / old_values[:, None]).T
        ratio = new_values[:, None] / old_values
        right = cosines / ratio if ups is None else ups[1].double().T @ ups[0].double()
        return cls(cosines, cosines * ratio, right)


def project(adapter: SubspaceAdapter, name: str, state: Mapping[str, Any], overlap: Overlap) -> dict[str, Any]:
    """The state of one parameter, carried to the next subspace. This is isotune's own; no paper says how.

    A first moment is mapped as a gradient is: a matrix as left N rightᵀ, a skew-symmetric generator as the skew part of
    that, a vector as the diagonal. A second moment is mapped by the squares of the same coefficients, as the variances
    of independent entries add up, so it stays at least 0. For the share of a new direction that lies outside the former
    subspace nothing is known: its first moment is 0, and its second one the mean over the parameter, as with 0 the
    first steps there would be too large.

    Args:
        adapter: the adapter.
        name: the name of the parameter.
        state: the optimiser's state of that parameter.
        overlap: of the two subspaces.

    Raises:
        ValueError: the optimiser keeps something else than torch's AdamW, Adam or SGD do, or the parameter is neither
            a matrix nor a vector of coordinates.
    """
    own = adapter.get_parameter(name)
    done: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != own.shape or key == "step":
            known = key == "step" or value is None or key in _FIRST + _SECOND
            if not known:
                raise ValueError(_unknown(key))
            done[key] = value
        elif key in _FIRST:
            done[key] = _mapped(adapter, name, value, overlap.left, overlap.right)
        elif key in _SECOND:
            left, right = overlap.left.square(), overlap.right.square()
            inside = overlap.cosines.square().sum(1).clamp_max(1.0)
            outside = 1.0 - inside[:, None] * inside
            mapped = _mapped(
                adapter, name, value, left, right, squared=True, more=outside * float(value.double().mean())
            )
            done[key] = mapped.clamp_min(0.0)
        else:
            raise ValueError(_unknown(key))
    return done


def _unknown(key: str) -> str:
    return (
        f"optimizer_state='project' is not possible with this optimiser, whose state has {key!r}: it can carry the "
        "moments of torch's AdamW, Adam and SGD alone. Use 'reset' or 'keep'."
    )


def _mapped(
    adapter: SubspaceAdapter,
    name: str,
    value: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    squared: bool = False,
    more: Tensor | None = None,
) -> Tensor:
    """A moment in the next coordinates, `more` added to it as a matrix."""
    size, wide, kind = adapter.size, value.double(), adapter.coordinates.get(name)
    extra = torch.zeros_like(left) if more is None else more
    if kind == "skew":
        matrix = skew_from_vector(wide, size)
        found = left @ (matrix.abs() if squared else matrix) @ right.T + extra
        result = vector_from_skew(0.5 * (found + found.T if squared else found - found.T))
    elif value.shape == (size, size):
        transposed = kind == "transposed"
        found = left @ (wide.T if transposed else wide) @ right.T + extra
        result = found.T if transposed else found
    elif value.shape == (size,):
        result = (left * right) @ wide + extra.diagonal()
    else:
        raise ValueError(
            f"optimizer_state='project' is not possible for {name} of {type(adapter).__name__}, of shape "
            f"{tuple(value.shape)}, which is no matrix or vector of the subspace's coordinates. Use 'reset' or 'keep'."
        )
    return result.to(value).contiguous()


def held_by(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """The first of these parameters that an optimiser does not have; None if it has all."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return next((name for name, parameter in parameters.items() if id(parameter) not in own), None)
