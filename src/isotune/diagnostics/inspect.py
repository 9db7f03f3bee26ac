"""Measuring what an adapter has learnt, layer by layer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.placement import left_vectors
from isotune.adapter.rotation import RotationAdapter
from isotune.diagnostics import geometry
from isotune.diagnostics.turn import MAX_DENSE, basis_of, turn, turned_weights
from isotune.files.adapter import ADAPTER, AdapterFile, describe, named_base
from isotune.methods.basis import BasisConfig
from isotune.methods.config import type_of
from isotune.methods.subspace import SubspaceConfig
from isotune.subspace.cache import SubspaceCache
from isotune.subspace.pinning import CANDIDATE_TOLERANCE
from isotune.subspace.result import SubspaceRequest
from isotune.subspace.solvers import principal_subspaces
from isotune.tuner.layer import Layer

MISSING_BASE = (
    "Not shown without the base model (--base MODEL): energy captured, size and ranks of the update, and how far the "
    "angles of the principal weights changed."
)

TOP = 16
"""k of ρ_k for an adapter that preserves no triplets of its own."""

Range = tuple[float, float]


@dataclass(frozen=True)
class LayerReport:
    """Measurements of one adapted layer; None where a value needs the base model or does not exist."""

    module: str
    rank: int
    """Rank of the update, or the number of inputs that a rotation acts on."""
    orthogonality_error: float | None
    """Largest entry of |RᵀR − I|; large by design for a free matrix or RoAd, None for an update without an operator."""
    largest_angle: float | None
    """Largest rotation angle of R, degrees; None for a free matrix, without one, or if it would take too long."""
    alpha: Range | None
    """Smallest and largest entry."""
    beta: Range | None
    base_residual: float | None = None
    """How far this base is from the one the adapter was trained on, by its pin: about 1e-5 for the same base."""
    energy: float | None = None
    """Share of ‖W‖_F² in the principal subspace."""
    update_norm: float | None = None
    """‖ΔW‖_F."""
    relative_norm: float | None = None
    """‖ΔW‖_F / ‖W‖_F."""
    stable_rank: float | None = None
    entropy_rank: float | None = None
    """Ranks of ΔW as defined in isotune.diagnostics.geometry."""
    angle_moved_largest: float | None = None
    angle_moved_mean: float | None = None
    """Change of the angles between the rows of the principal weight P V, or of W if all of it changes, degrees."""
    top: int | None = None
    """k of the next."""
    interference: float | None = None
    """ρ_k, the share of ‖ΔW‖_F² in the span of the k strongest singular vectors of W; None if ΔW is zero."""
    accumulated_rank: int | None = None
    """Rank of the update accumulated on earlier subspaces; None if the subspace has never moved."""


@dataclass(frozen=True)
class AdapterReport:
    """Measurements of a whole adapter."""

    directory: str
    method: str
    base: str | None
    """The base model; None if none was used."""
    parameters: int
    """Trainable parameters in the adapted layers."""
    layers: list[LayerReport]
    of_rank: bool = True
    """Whether `rank` is that of an update; if not, the width of a rotation."""
    subspaces: bool = True
    """Whether the method acts on principal subspaces."""
    moves: int = 0
    """The number of the boundary at which the subspaces last moved."""

    def summary(self) -> str:
        """One line about all layers."""
        ranks = sorted({layer.rank for layer in self.layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        parts = [
            f"{self.method}: {len(self.layers)} layers of {'rank' if self.of_rank else 'width'} {shown}, "
            f"{self.parameters:,} trainable parameters",
        ]
        if any(layer.orthogonality_error is not None for layer in self.layers):
            parts.append(f"orthogonality error at most {_most(self.layers, 'orthogonality_error'):.1e}")
        if self.moves:
            kept = sorted(layer.accumulated_rank or 0 for layer in self.layers)
            parts.append(f"moved up to boundary {self.moves}, with accumulated updates of rank {kept[0]} to {kept[-1]}")
        if any(layer.largest_angle is not None for layer in self.layers):
            parts.append(f"rotated by at most {_most(self.layers, 'largest_angle'):.1f}°{self._since}")
        if self.base is not None:
            if self.subspaces:
                energies = [layer.energy for layer in self.layers if layer.energy is not None]
                parts.append(f"principal subspaces hold {min(energies):.0%} to {max(energies):.0%} of the energy")
            parts.append(f"update at most {_most(self.layers, 'relative_norm'):.1%} of the weight")
            if any(layer.interference is not None for layer in self.layers):
                tops = sorted({layer.top for layer in self.layers if layer.top is not None})
                k = str(tops[0]) if len(tops) == 1 else f"{tops[0]} to {tops[-1]}"
                share = _most(self.layers, "interference")
                parts.append(f"at most {share:.1%} of it in the {k} strongest directions")
            what = "principal weights" if self.subspaces else "weights"
            parts.append(
                f"angles of {what} changed by at most {_most(self.layers, 'angle_moved_largest'):.2g}°{self._since}"
            )
        return "; ".join(parts) + "."

    @property
    def _since(self) -> str:
        """From where angles are measured, if not from the base: each principal subspace is measured by itself."""
        return " since the last move" if self.moves and self.subspaces else ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every field, the summary, and what is missing."""
        missing = None if self.base is not None else MISSING_BASE
        return {**dataclasses.asdict(self), "summary": self.summary(), "missing": missing}


def inspect(
    directory: str | os.PathLike[str],
    base: nn.Module | str | None = None,
    *,
    top: int | None = None,
    trust_remote_code: bool = False,
) -> AdapterReport:
    """Measure an isotune adapter folder, with its base model if there is one.

    Args:
        directory: the adapter's folder.
        base: the base model or its name; by default the one that the adapter's configuration names. If that cannot be
            loaded, the report is limited to what the file alone shows.
        top: k of ρ_k, at most the smaller side of each weight; by default the number of triplets that an adapter
            preserves, or else TOP.
        trust_remote_code: whether to run code from the base model's repository.

    Raises:
        AdapterFileError: the folder is not a valid isotune adapter.
        BaseMismatchError: the base is not the one the adapter was trained on.
        ValueError: the base that was asked for cannot be loaded, or `top` is below 1.
    """
    if top is not None and top < 1:
        raise ValueError(f"top={top} is not allowed; it must be at least 1, the number of strongest directions.")
    file = describe(directory)
    name = base if isinstance(base, str) else file.config.base_model_name_or_path
    model = base if isinstance(base, nn.Module) else None
    if model is None and name:
        try:
            model = named_base(directory, base, trust_remote_code=trust_remote_code)
        except ValueError:
            if base is not None:
                raise
    placed = {} if model is None else file.place(model)
    parameters = sum(p.numel() for module in file.layers for p in file.operator(module).parameters())
    with torch.no_grad():
        strongest = _strongest(placed, top)
        layers = [_measure(file, module, placed.get(module), strongest.get(module)) for module in file.layers]
    label = None if model is None else str(name or type(model).__name__)
    kinds = isinstance(file.config, BasisConfig), isinstance(file.config, SubspaceConfig)
    moves = max((int(tensors.get("isotune_form.moves", 0)) for tensors in file.layers.values()), default=0)
    return AdapterReport(str(directory), type_of(file.config), label, parameters, layers, *kinds, moves)


def _strongest(layers: Mapping[str, Layer], top: int | None) -> dict[str, Tensor]:
    """V, (k, in), of the weight of each layer."""
    requests = []
    for name, layer in layers.items():
        k = min(top or getattr(layer.adapter(ADAPTER), "preserved", TOP), layer.in_features, layer.out_features)
        requests.append(SubspaceRequest(layer.unmerged_matrix, k, f"module {name!r}"))
    found = principal_subspaces(requests, tolerance=CANDIDATE_TOLERANCE, cache=SubspaceCache())
    return {name: subspace.basis for name, subspace in zip(layers, found, strict=True)}


def _measure(file: AdapterFile, module: str, layer: Layer | None, strongest: Tensor | None) -> LayerReport:
    operator: Any = file.operator(module)
    turned = turn(operator)
    rotates = isinstance(operator, RotationAdapter)
    report = LayerReport(
        module=module,
        rank=operator.size,
        orthogonality_error=turned.orthogonality_error,
        largest_angle=None if turned.angles is None else math.degrees(float(turned.angles[0])),
        alpha=None if rotates else _range(getattr(operator, "input_scale", None)),
        beta=_range(operator.gain if rotates else getattr(operator, "output_scale", None)),
        accumulated_rank=file.config.accumulated_rank(module),
    )
    if layer is None or strongest is None:
        return report
    matrix = layer.unmerged_matrix()
    weight = matrix.float()
    before, after = turned_weights(layer, ADAPTER)
    moved = geometry.angle_change(before, after)
    values: Tensor | None
    if rotates:
        change = after - before
        change = change.mT if operator.side == "output" else change
        norm = float(torch.linalg.vector_norm(change))
        values = torch.linalg.svdvals(change) if min(change.shape) <= MAX_DENSE else None
    else:
        up, down = layer.low_rank(ADAPTER)
        values = geometry.factored_singular_values(up, down)
        norm, change = float(torch.linalg.vector_norm(values)), up @ down
    if layer.bases(ADAPTER):
        placement = layer.subspace(ADAPTER).placement
        assert placement is not None
        own = placement.down[: operator.basis_rank]
        energy = geometry.energy_captured(weight, basis_of(own)) if operator.principal else None
        report = dataclasses.replace(report, base_residual=placement.residual, energy=energy)
    share = geometry.interference(change, left_vectors(weight @ strongest.mT, matrix.dtype), strongest)
    return dataclasses.replace(
        report,
        update_norm=norm,
        relative_norm=norm / max(float(torch.linalg.vector_norm(weight)), torch.finfo(torch.float32).tiny),
        stable_rank=None if values is None else geometry.stable_rank(values),
        entropy_rank=None if values is None else geometry.entropy_rank(values),
        angle_moved_largest=math.degrees(moved.largest),
        angle_moved_mean=math.degrees(moved.mean),
        top=len(strongest),
        interference=share if norm > 0 else None,
    )


def _range(vector: Tensor | None) -> Range | None:
    return None if vector is None else (float(vector.min()), float(vector.max()))


def _most(layers: Sequence[LayerReport], field: str) -> float:
    values: list[float] = [getattr(layer, field) for layer in layers]
    return max(value for value in values if value is not None)
