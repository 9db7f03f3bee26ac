"""An adapter folder of PEFT's own and its base model, and how its tensors become a model of isotune's."""

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
"""Relative difference of an update up to which an imported layer counts as the same function."""


@dataclass(frozen=True)
class Source:
    """What PEFT's folder holds, and the plain base model that it belongs to."""

    folder: Path
    config: Any
    layers: dict[str, dict[str, Tensor]]
    """Module name -> its tensors, named as in PEFT's layer."""
    base: nn.Module

    def weight(self, name: str) -> Tensor:
        """W of an adapted module, (out, in); refuses what is no nn.Linear of the base."""
        try:
            module = self.base.get_submodule(name)
        except AttributeError:
            module = None
        if isinstance(module, nn.Linear):
            return module.weight.detach()
        found = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)):
            raise AdapterFileError(
                f"{self.folder}: the adapter is on {name!r}, a {found}, and only adapters on nn.Linear are imported: "
                "on other layers PEFT computes other functions than isotune, such as a rotation of each of a "
                "convolution's overlapping patches. Train it anew with isotune's own method."
            )
        raise AdapterFileError(
            f"{self.folder}: the adapter is on an nn.Linear {name!r}, and this base model has "
            f"{'no such module' if module is None else f'a {found}'}. Give the plain base model that it was trained "
            "on, loaded with the same class."
        )

    def tensor(self, name: str, key: str, dimensions: int) -> Tensor:
        """A tensor of an adapted nn.Linear, float32 at least; refuses one that is not there or of other dimensions."""
        self.weight(name)
        tensor = self.layers[name].get(key)
        if tensor is None or tensor.ndim != dimensions:
            found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
            raise AdapterFileError(
                f"{self.folder / WEIGHTS_FILE} should hold a tensor {key!r} of {dimensions} dimensions for {name!r}, "
                f"and holds {found}; save the adapter again."
            )
        return widen(tensor)

    def configured(self, kind: type[_Config], *names: str, **fields: Any) -> _Config:
        """A configuration of isotune's: what every method has and `names` as in PEFT's, and `fields`."""
        names += ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
                  "bias", "task_type", "auto_mapping", "revision")  # fmt: skip
        same = {name: getattr(self.config, name) for name in names if hasattr(self.config, name)}  # PSOFT has no bias
        with refused(f"{self.folder / CONFIG_FILE}: "):
            return kind(**{**same, **fields})

    def adapted(self, config: IsotuneConfig, parameters: Mapping[str, Mapping[str, Tensor]]) -> PeftModel:
        """The base with isotune's adapter; `parameters` maps a module to those of its operator, by name."""
        with refused(f"{self.folder}: "):
            model = get_peft_model(self.base, config)
        layers = dict(adapted_layers(model, ADAPTER))
        if layers.keys() != parameters.keys():
            odd = min(layers.keys() ^ parameters.keys())
            raise AdapterFileError(
                f"{self.folder}: its configuration and its tensors disagree on {odd!r} being adapted."
            )
        for name, layer in layers.items():
            with refused(
                f"{self.folder}: the tensors of {name!r} are not what {CONFIG_FILE} and the base model say (",
                "). Check that the files belong together, and give the base model that the adapter was trained on.",
            ):
                layer.adapter(ADAPTER).load_state_dict(parameters[name])
        return model


def series_fields(terms: int) -> dict[str, Any]:
    """A Neumann series of PEFT's of 3 terms or more; those of 3 and 4 terms are the same polynomial."""
    return {"use_cayley_neumann": True, "num_cayley_neumann_terms": max(terms - 2, 2)}
