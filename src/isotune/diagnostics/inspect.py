"""Measuring what an adapter has learnt, layer by layer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.rotation import RotationAdapter
from isotune.diagnostics import geometry
from isotune.diagnostics.turn import MAX_DENSE, basis_of, turn, turned_weights
from isotune.files.adapter import ADAPTER, AdapterFile, describe, named_base, read_config
from isotune.methods.config import SubspaceConfig
from isotune.tuner.layer import Layer

MISSING_BASE = (
    "Not shown without the base model (--base MODEL): energy captured, size and ranks of the update, and how far the "
    "angles of the principal weights changed."
)

Range = tuple[float, float]


@dataclass(frozen=True)
class LayerReport:
    """Measurements of one adapted layer; None where a value needs the base model or does not exist."""

    module: str
    rank: int
    """Rank of the principal subspace, or the number of inputs that a rotation acts on."""
    orthogonality_error: float
    """Largest entry of |RᵀR − I|; large by design for a free matrix."""
    largest_angle: float | None
    """Largest rotation angle of R, degrees; None for a free matrix or if it would take too long."""
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
    """Change of the angles between the rows of the principal weight P V, or of W under a rotation, degrees."""
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
    subspaces: bool = True
    """Whether the method acts on principal subspaces; if not, it rotates all inputs."""
    moves: int = 0
    """The number of the boundary at which the subspaces last moved."""

    def summary(self) -> str:
        """One line about all layers."""
        ranks = sorted({layer.rank for layer in self.layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        parts = [
            f"{self.method}: {len(self.layers)} layers of {'rank' if self.subspaces else 'width'} {shown}, "
            f"{self.parameters:,} trainable parameters",
            f"orthogonality error at most {_most(self.layers, 'orthogonality_error'):.1e}",
        ]
        if self.moves:
            kept = sorted(layer.accumulated_rank or 0 for layer in self.layers)
            parts.append(f"moved {self.moves} times, with accumulated updates of rank {kept[0]} to {kept[-1]}")
        if any(layer.largest_angle is not None for layer in self.layers):
            parts.append(f"rotated by at most {_most(self.layers, 'largest_angle'):.1f}°")
        if self.base is not None:
            if self.subspaces:
                energies = [layer.energy for layer in self.layers if layer.energy is not None]
                parts.append(f"principal subspaces hold {min(energies):.0%} to {max(energies):.0%} of the energy")
            parts.append(f"update at most {_most(self.layers, 'relative_norm'):.1%} of the weight")
            what = "principal weights" if self.subspaces else "weights"
            parts.append(f"angles of {what} changed by at most {_most(self.layers, 'angle_moved_largest'):.2g}°")
        return "; ".join(parts) + "."

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every field, the summary, and what is missing."""
        missing = None if self.base is not None else MISSING_BASE
        return {**dataclasses.asdict(self), "summary": self.summary(), "missing": missing}


def inspect(
    directory: str | os.PathLike[str], base: nn.Module | str | None = None, *, trust_remote_code: bool = False
) -> AdapterReport:
    """Measure an isotune adapter folder, with its base model if there is one.

    Args:
        directory: the adapter's folder.
        base: the base model or its name; by default the one that the adapter's configuration names. If that cannot be
            loaded, the report is limited to what the file alone shows.
        trust_remote_code: whether to run code from the base model's repository.

    Raises:
        AdapterFileError: the folder is not a valid isotune adapter.
        BaseMismatchError: the base is not the one the adapter was trained on.
        ValueError: the base that was asked for cannot be loaded.
    """
    file = describe(directory)
    raw = read_config(directory)
    name = base if isinstance(base, str) else raw.get("base_model_name_or_path")
    model = base if isinstance(base, nn.Module) else None
    if model is None and name:
        try:
            model = named_base(directory, base, trust_remote_code=trust_remote_code)
        except ValueError:
            if base is not None:
                raise
    placed = {} if model is None else file.place(model)
    parameters = sum(t.numel() for layer in file.layers.values() for k, t in layer.items() if "_operator." in k)
    with torch.no_grad():
        layers = [_measure(file, module, placed.get(module)) for module in file.layers]
    label = None if model is None else str(name or type(model).__name__)
    subspaces = isinstance(file.config, SubspaceConfig)
    moves = max((int(tensors.get("isotune_form.moves", 0)) for tensors in file.layers.values()), default=0)
    return AdapterReport(str(directory), str(raw["peft_type"]), label, parameters, layers, subspaces, moves)


def _measure(file: AdapterFile, module: str, layer: Layer | None) -> LayerReport:
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
    if layer is None:
        return report
    weight = layer.unmerged_matrix().float()
    before, after = turned_weights(layer, ADAPTER)
    moved = geometry.angle_change(before, after)
    values: Tensor | None
    if rotates:
        change = after - before
        norm = float(torch.linalg.vector_norm(change))
        values = torch.linalg.svdvals(change) if min(change.shape) <= MAX_DENSE else None
    else:
        up, down = layer.low_rank(ADAPTER)
        values = geometry.factored_singular_values(up, down)
        norm = float(torch.linalg.vector_norm(values))
        placement = layer.subspace(ADAPTER).placement
        assert placement is not None
        energy = geometry.energy_captured(weight, basis_of(down[: operator.size]))
        report = dataclasses.replace(report, base_residual=placement.residual, energy=energy)
    return dataclasses.replace(
        report,
        update_norm=norm,
        relative_norm=norm / max(float(torch.linalg.vector_norm(weight)), torch.finfo(torch.float32).tiny),
        stable_rank=None if values is None else geometry.stable_rank(values),
        entropy_rank=None if values is None else geometry.entropy_rank(values),
        angle_moved_largest=math.degrees(moved.largest),
        angle_moved_mean=math.degrees(moved.mean),
    )


def _range(vector: Tensor | None) -> Range | None:
    return None if vector is None else (float(vector.min()), float(vector.max()))


def _most(layers: Sequence[LayerReport], field: str) -> float:
    values: list[float] = [getattr(layer, field) for layer in layers]
    return max(value for value in values if value is not None)
