"""What becomes of an optimiser's state when the subspace under its parameters moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotune.adapter.placement import Placement
from isotune.adapter.restarting import RestartingAdapter
from isotune.adapter.subspace import SubspaceAdapter
from isotune.adapter.update import PlacedUpdate
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

    def first(self, adapter: Any, name: str, moment: Tensor) -> Tensor:
        """A matrix as left N rightᵀ, a generator as the skew part of that, a vector as its diagonal."""
        return _mapped(adapter, name, moment, self.left, self.right)

    def second(self, adapter: Any, name: str, moment: Tensor) -> Tensor:
        """The same with the squares of the coefficients, and the mean for what lies outside the former subspace."""
        inside = self.cosines.square().sum(1).clamp_max(1.0)
        more = (1.0 - inside[:, None] * inside) * float(moment.mean())
        return _mapped(adapter, name, moment, self.left.square(), self.right.square(), squared=True, more=more)


@dataclass(frozen=True)
class Factors:
    """How the gradients of two factors become those of the next: of A, Bᵀ G, and of B, G Aᵀ, with one gradient G of W.

    With X' = C X + a rest outside, X the rows that the gradient of a factor is read through (those of Bᵀ for A, of A
    for B) and X' the next ones, the next gradient is C times the former one, as far as X' lies in the span of X.
    """

    coefficients: Mapping[str, Tensor]
    """Parameter name -> C, (r, r)."""
    outside: Mapping[str, Tensor]
    """Parameter name -> the squared length of what of each row of X' lies outside, in units of the mean squared length
    of the rows of X; 1 for a row of zeros, (r,)."""

    @classmethod
    def of(cls, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Factors:
        """From A (r, in) and Bᵀ (r, out) before and after a move, in float64."""
        coefficients, outside = {}, {}
        for name, old, new in zip(("lora_B", "lora_A"), before, after, strict=True):
            old, new = old.double(), new.double()
            found = coefficients[name] = new @ torch.linalg.pinv(old, rtol=1e-6)
            lengths, usual = new.square().sum(1), old.square().sum(1).mean()
            rest = (new - found @ old).square().sum(1) / torch.where(usual > 0, usual, 1.0)
            outside[name] = torch.where(lengths > 0, rest, 1.0)
        return cls(coefficients, outside)

    def first(self, adapter: Any, name: str, moment: Tensor) -> Tensor:
        """C times the moment, in its layout."""
        return self._times(name, self.coefficients[name], moment)

    def second(self, adapter: Any, name: str, moment: Tensor) -> Tensor:
        """The squares of C times the moment, and its mean for what lies outside."""
        found = self._times(name, self.coefficients[name].square(), moment)
        more = self.outside[name] * float(moment.mean())
        return found + (more[:, None] if name == "lora_A" else more)

    @staticmethod
    def _times(name: str, coefficients: Tensor, moment: Tensor) -> Tensor:
        return coefficients @ moment if name == "lora_A" else moment @ coefficients.T


def between(adapter: PlacedUpdate, placement: Placement, values: Mapping[str, Tensor]) -> Overlap | Factors:
    """How the moments of a placed adapter are carried to its next placement.

    Args:
        adapter: the adapter, before the move.
        placement: the next one.
        values: the values at which its parameters start there.
    """
    if isinstance(adapter, RestartingAdapter):
        before = adapter.lora_A.detach(), adapter.lora_B.detach().T
        return Factors.of(before, (values["lora_A"], values["lora_B"].T.to(before[1])))
    assert isinstance(adapter, SubspaceAdapter)
    assert adapter.placement is not None
    (old_down, old_up), (new_down, new_up), rank = adapter.placement.factors, placement.factors, adapter.size
    ups = (old_up[:, :rank], new_up[:, :rank]) if adapter.power is None else None
    return Overlap.of(old_down[:rank], new_down[:rank], ups)


def project(adapter: PlacedUpdate, name: str, state: Mapping[str, Any], overlap: Overlap | Factors) -> dict[str, Any]:
    """The state of one parameter, carried to the next subspace. This is isotune's own; no paper says how.

    A first moment is mapped as a gradient is. A second moment is mapped by the squares of the same coefficients, as the
    variances of independent entries add up, so it stays at least 0. For the share of a new direction that lies outside
    the former subspace nothing is known: its first moment is 0, and its second one the mean over the parameter, as with
    0 the first steps there would be too large.

    Args:
        adapter: the adapter.
        name: the name of the parameter.
        state: the optimiser's state of that parameter.
        overlap: of the two subspaces, as `between` gives it.

    Raises:
        ValueError: the optimiser keeps something else than torch's AdamW, Adam or SGD do, or the parameter is neither
            a matrix nor a vector of coordinates.
    """
    own = adapter.get_parameter(name)
    done: dict[str, Any] = {}
    for key, value in state.items():
        if key not in ("step", *_FIRST, *_SECOND) and value is not None:
            raise ValueError(
                f"optimizer_state='project' is not possible with this optimiser, whose state has {key!r}: it can carry "
                "the moments of torch's AdamW, Adam and SGD alone. Use 'reset' or 'keep'."
            )
        done[key] = value
        if not isinstance(value, Tensor) or value.shape != own.shape:
            continue
        if key in _FIRST:
            done[key] = overlap.first(adapter, name, value.double()).to(value).contiguous()
        elif key in _SECOND:
            done[key] = overlap.second(adapter, name, value.double()).to(value).contiguous().clamp_min(0.0)
    return done


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
    size, kind = adapter.size, adapter.coordinates.get(name)
    extra = torch.zeros_like(left) if more is None else more
    if kind == "skew":
        matrix = skew_from_vector(value, size)
        found = left @ (matrix.abs() if squared else matrix) @ right.T + extra
        return vector_from_skew(0.5 * (found + found.T if squared else found - found.T))
    if value.shape == (size, size):
        transposed = kind == "transposed"
        found = left @ (value.T if transposed else value) @ right.T + extra
        return found.T if transposed else found
    if value.shape == (size,):
        return (left * right) @ value + extra.diagonal()
    raise ValueError(
        f"optimizer_state='project' is not possible for {name} of {type(adapter).__name__}, of shape "
        f"{tuple(value.shape)}, which is no matrix or vector of the subspace's coordinates. Use 'reset' or 'keep'."
    )
