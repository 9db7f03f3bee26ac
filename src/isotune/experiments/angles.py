"""The geometry of a trained model for the record of its run: how far it turned, and what it kept of its weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from isotune.diagnostics import geometry
from isotune.diagnostics.turn import turn, turned_weights
from isotune.tuner.layer import Layer

FORMAT = 1
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
MAPS = 2
"""So many layers have a heat map: that which changed most, and the middle one."""
MAP_ROWS = 24
_MAX_DENSE = 768
"""Above this width the angles of BOFT's and GOFT's rotations would take longer than a short training."""
_KEPT = 1e-5
"""Radians and relative norm: what single precision leaves of a map that keeps both."""


@torch.no_grad()
def adapter_geometry(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any] | None:
    """Measure every layer of an isotune adapter, by default the first active one; None for a model without one.

    Returns:
        What JSON can hold, angles in degrees: "strict" (angles between rows and norms of the turned weights are kept in
        all layers), "subspaces" (the turned weights are the principal ones, else the whole), "layers" with a row each
        ("rotation" is None for a free matrix, without one, and where finding it takes too long; "orthogonality_error"
        is None without one), and "heat_maps" of the layer whose angles moved most and of the middle one: of some rows
        the angles of every pair i < j, row by row.
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if adapter_name is None:
        adapter_name = next((name for layer in layers for name in layer.active_adapters if name in layer.configs), None)
    layers = [layer for layer in layers if adapter_name in layer.configs]
    if adapter_name is None or not layers:
        return None
    rows = [_row(layer, adapter_name) for layer in layers]
    order = sorted(range(len(rows)), key=lambda i: _change(rows[i]), reverse=True)
    chosen = list(dict.fromkeys([order[0], order[len(order) // 2]]))[:MAPS]
    return {
        "format": FORMAT,
        "subspaces": layers[0].adapter(adapter_name).principal,
        "strict": all(math.radians(row["angles_moved"]["largest"]) <= _KEPT for row in rows)
        and all(row["norms_moved"]["largest"] <= _KEPT for row in rows),
        "layers": rows,
        "heat_maps": [_heat_map(layers[i], adapter_name) for i in chosen],
    }


def _row(layer: Layer, adapter_name: str) -> dict[str, Any]:
    operator = layer.adapter(adapter_name)
    turned = turn(operator, max_dense=_MAX_DENSE)
    before, after = turned_weights(layer, adapter_name)
    angles, norms = geometry.angle_change(before, after), geometry.norm_change(before, after)
    rotation = None
    if turned.angles is not None:
        degrees = turned.angles.rad2deg()
        quantiles = [_short(value) for value in degrees.quantile(degrees.new_tensor(QUANTILES))]
        rotation = {"largest": _short(degrees[0]), "mean": _short(degrees.mean()), "quantiles": quantiles}
    return {
        "module": layer.key,
        "size": operator.size,
        "orthogonality_error": None if turned.orthogonality_error is None else _short(turned.orthogonality_error),
        "rotation": rotation,
        "angles_moved": {"largest": _short(math.degrees(angles.largest)), "mean": _short(math.degrees(angles.mean))},
        "norms_moved": {"largest": _short(norms.largest), "mean": _short(norms.mean)},
    }


def _change(row: dict[str, Any]) -> tuple[float, float]:
    # Where all angles are kept their differences are rounding, and the layer that turned furthest tells more.
    rotation = row["rotation"]
    return round(row["angles_moved"]["largest"], 2), 0.0 if rotation is None else rotation["largest"]


def _heat_map(layer: Layer, adapter_name: str) -> dict[str, Any]:
    before, after = turned_weights(layer, adapter_name)
    whole = (before.any(1) & after.any(1)).nonzero().flatten()
    rows = whole[geometry.spaced(len(whole), MAP_ROWS).to(whole.device)] if len(whole) else whole
    return {"module": layer.key, "rows": rows.tolist(), "before": _pairs(before[rows]), "after": _pairs(after[rows])}


def _pairs(rows: Tensor) -> list[float]:
    angles = geometry.pairwise_angles(rows).rad2deg().cpu()
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return [round(value, 3) for value in angles[first, second].tolist()]


def _short(value: float | Tensor) -> float:
    """Four digits, as a run has hundreds of these."""
    return float(f"{float(value):.4g}")
