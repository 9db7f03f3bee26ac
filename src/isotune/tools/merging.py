"""The weighted mean of adapter folders, without their base model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from isotune.files.adapter import WEIGHTS_FILE, AdapterFile, describe, new_directory
from isotune.files.tensors import save_tensors
from isotune.methods.config import type_of
from isotune.tuner.mean import Part, check_request, combine
from isotune.tuner.state import KEY_PREFIX


@dataclass(frozen=True)
class Merged:
    """The result of `merge_adapters`."""

    method: str
    """Type of the adapters, such as ISOTUNE_PSOFT."""
    layers: int
    weights: tuple[float, ...]
    error: float
    """How far the new adapter is from the mean, as a share of what the mean changes; 0 if it is exact."""

    def __str__(self) -> str:
        shares = ", ".join(f"{weight:g}" for weight in self.weights)
        exact = "exact" if not self.error else f"differs from the mean by {self.error:.1%} of what that changes"
        return f"{self.method}, {self.layers} layers, weights {shares}, {exact}"

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"method": self.method, "layers": self.layers, "weights": list(self.weights), "error": self.error}


def merge_adapters(
    directories: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    combination_type: Literal["rotation", "orthomerge"] = "rotation",
    *,
    base: str | None = None,
) -> Merged:
    """Write the weighted mean of adapters of one method on one base as a new adapter folder.

    The mean is that of `add_weighted_adapter`, on the files alone: no base model is loaded. Adapters on a subspace must
    store the same subspace (their pins say so); rotations of all inputs must name the same base model.

    Args:
        directories: folders of two or more adapters, or of one with a weight.
        out: the folder to write; it appears only when it is complete.
        weights: one finite number for each; None for equal ones that sum to one.
        combination_type: as in `add_weighted_adapter`.
        base: the base model that the new adapter names; needed where the adapters name different ones, such as several
            places of one model.

    Returns:
        What was merged.

    Raises:
        ValueError: the adapters differ in method, modules, sizes, options, basis or base model, hold saved modules or
            biases, have no mean, or the weights do not fit; or `out` is not empty. Nothing is written then.
        AdapterFileError: a folder holds no adapter of isotune, or is damaged.
    """
    names = [os.fspath(directory) for directory in directories]
    if not names:
        raise ValueError("No adapter is given; give the folders of two or more, or of one with a weight.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is given twice; give each adapter's folder once, and a weight to count it more.")
    files = {name: describe(name) for name in names}
    if weights is None:
        weights = [1 / len(files)] * len(files)
    configs = {name: file.config for name, file in files.items()}
    check_request(list(files), weights, "", configs, combination_type)
    bases = {name: (config.base_model_name_or_path, config.revision) for name, config in configs.items()}
    if base is None and len(set(bases.values())) > 1:
        named = ", ".join(f"{name} names {found[0]!r}" for name, found in bases.items())
        raise ValueError(
            f"The adapters name different base models ({named}), and adapters of different models have no mean. If "
            "these are one model in several places, say which to name: base=... in Python, --base on the command line."
        )
    for name, file in files.items():
        if file.extras:
            raise ValueError(f"{name} also holds {min(file.extras)!r}; only adapters without it can be merged.")
    first, *others = files.values()
    for other in others:
        if odd := first.layers.keys() ^ other.layers.keys():
            raise ValueError(
                f"{first.directory} and {other.directory} adapt different modules, such as {min(odd)!r}, hence have no "
                "mean."
            )
    found = combine(
        {module: {name: _part(file, module) for name, file in files.items()} for module in first.layers},
        weights,
        combination_type,
    )
    found.warn()
    tensors: dict[str, Tensor] = {}
    for module, own in first.layers.items():
        values = {f"isotune_operator.{name}": value for name, value in found.values[module].items()}
        for name, tensor in own.items():
            tensors[f"{KEY_PREFIX}{module}.{name}"] = values.get(name, tensor).to(tensor.dtype)
    config = copy.deepcopy(first.config)
    if base is not None:
        config.base_model_name_or_path, config.revision = base, None
    with new_directory(out) as folder:
        save_tensors(tensors, folder / WEIGHTS_FILE)
        config.save_pretrained(str(folder))
    return Merged(type_of(config), len(first.layers), tuple(weights), found.error)


def _part(file: AdapterFile, module: str) -> Part:
    """What an adapter file holds of a module."""
    forms = {name: tensor for name, tensor in sorted(file.layers[module].items()) if name.startswith("isotune_form.")}
    stored = [tensor for name, tensor in forms.items() if not name.endswith(".moves")]
    moved = len(forms) > len(stored)
    return Part(file.operator(module), tuple(stored), any(name.endswith(".basis") for name in forms), moved)
