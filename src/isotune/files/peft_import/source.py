"""A folder of PEFT's own adapter with its base model, and the building of isotune's model from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from isotune.errors import AdapterFileError
from isotune.files.adapter import ADAPTER, CONFIG_FILE, WEIGHTS_FILE, refused
from isotune.hosts import widen
from isotune.methods.config import IsotuneConfig
from isotune.tuner.state import adapted_layers

_Config = TypeVar("_Config", bound=IsotuneConfig)
EXACT = 1e-5
"""Relative difference of updates up to which an imported layer counts as the same function."""


@dataclass(frozen=True)
class Source:
    """The content of PEFT's folder, and the plain base model it belongs to."""

    folder: Path
    config: Any
    layers: dict[str, dict[str, Tensor]]
    """Module name -> its tensors, named as in PEFT's layer."""
    base: nn.Module

    def weight(self, name: str) -> Tensor:
        """W of an adapted module, (out, in); refused if it is not an nn.Linear of the base."""
        try:
            module = self.base.get_submodule(name)
        except AttributeError:
            module = None
        if isinstance(module, nn.Linear):
            return module.weight.detach()
        found = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)):
            raise AdapterFileError(
                f"{self.folder}: the adapter is on {name!r}, a {found}, but only adapters on nn.Linear can be "
                "imported: on other layers PEFT computes something else than isotune, such as a rotation of each of a "
                "convolution's overlapping patches. Train it again with isotune's own method."
            )
        raise AdapterFileError(
            f"{self.folder}: the adapter is on an nn.Linear {name!r}, but this base model has "
            f"{'no such module' if module is None else f'a {found}'}. Give the plain base model it was trained on, "
            "loaded with the same class."
        )

    def tensor(self, name: str, key: str, dimensions: int) -> Tensor:
        """A tensor of an adapted nn.Linear, at least float32; refused if missing or of another number of dimensions."""
        self.weight(name)
        tensor = self.layers[name].get(key)
        if tensor is None or tensor.ndim != dimensions:
            found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
            raise AdapterFileError(
                f"{self.folder / WEIGHTS_FILE} should hold a tensor {key!r} of {dimensions} dimensions for {name!r}, "
                f"but holds {found}; save the adapter again."
            )
        return widen(tensor)

    def configured(self, kind: type[_Config], *names: str, **fields: Any) -> _Config:
        """Make isotune's configuration: the common options and `names` with PEFT's values, and `fields`."""
        names += ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
                  "bias", "task_type", "auto_mapping", "revision")  # fmt: skip
        same = {name: getattr(self.config, name) for name in names if hasattr(self.config, name)}  # PSOFT has no bias
        with refused(f"{self.folder / CONFIG_FILE}: "):
            return kind(**{**same, **fields})

    def adapted(self, config: IsotuneConfig, parameters: Mapping[str, Mapping[str, Tensor]]) -> PeftModel:
        """Put isotune's adapter on the base; `parameters` holds each module's operator parameters by name."""
        with refused(f"{self.folder}: "):
            model = get_peft_model(self.base, config)
        layers = dict(adapted_layers(model, ADAPTER))
        if layers.keys() != parameters.keys():
            odd = min(layers.keys() ^ parameters.keys())
            raise AdapterFileError(
                f"{self.folder}: its configuration and its tensors disagree on whether {odd!r} is adapted; save the "
                "adapter again."
            )
        for name, layer in layers.items():
            with refused(
                f"{self.folder}: the tensors of {name!r} do not fit {CONFIG_FILE} and the base model (",
                "). Check that the files belong together, and give the base model the adapter was trained on.",
            ):
                layer.adapter(ADAPTER).load_state_dict(parameters[name])
        return model


def series_fields(terms: int) -> dict[str, Any]:
    """Options for PEFT's Neumann series of 3 or more terms; those of 3 and 4 terms are the same polynomial."""
    return {"use_cayley_neumann": True, "num_cayley_neumann_terms": max(terms - 2, 2)}
