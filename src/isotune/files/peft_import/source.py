"""An adapter folder of PEFT's own and its base model, and how its tensors become a model of isotune's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from isotune.errors import AdapterFileError
from isotune.files.adapter import ADAPTER, CONFIG_FILE, WEIGHTS_FILE, adapted_layers
from isotune.hosts import widen
from isotune.methods.config import RotationConfig
from isotune.tuner.layer import Layer

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
        """W of an adapted module, (out, in).

        Args:
            name: of the module.

        Raises:
            AdapterFileError: the base has no such module, or it is no nn.Linear.
        """
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
        """A tensor of an adapted nn.Linear, float32 at least.

        Args:
            name: of the module.
            key: of the tensor behind it.
            dimensions: how many it must have.

        Raises:
            AdapterFileError: there is no such tensor of so many dimensions, or no such nn.Linear.
        """
        self.weight(name)
        tensor = self.layers[name].get(key)
        if tensor is None or tensor.ndim != dimensions:
            found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
            raise AdapterFileError(
                f"{self.folder / WEIGHTS_FILE} should hold a tensor {key!r} of {dimensions} dimensions for {name!r}, "
                f"and holds {found}; save the adapter again."
            )
        return widen(tensor)

    def fill(self, model: PeftModel, parameters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Layer]:
        """Put parameters into the operators of a model.

        Args:
            model: the adapted base.
            parameters: module name -> name of the parameter -> its values.

        Returns:
            Module name -> layer.

        Raises:
            AdapterFileError: other modules are adapted, or a shape is another.
        """
        adapted = dict(adapted_layers(model, ADAPTER))
        if adapted.keys() != parameters.keys():
            odd = min(adapted.keys() ^ parameters.keys())
            raise AdapterFileError(
                f"{self.folder}: {CONFIG_FILE} and {WEIGHTS_FILE} disagree on {odd!r} being adapted."
            )
        for name, layer in adapted.items():
            for key, parameter in layer.adapter(ADAPTER).named_parameters():
                value = parameters[name][key]
                if value.shape != parameter.shape:
                    raise AdapterFileError(
                        f"{self.folder}: size mismatch for {name!r}: by {CONFIG_FILE} and the base model its {key} has "
                        f"shape {tuple(parameter.shape)}, by {WEIGHTS_FILE} {tuple(value.shape)}. Check that the files "
                        "belong together, and give the base model that the adapter was trained on."
                    )
                with torch.no_grad():
                    parameter.copy_(value)
        return adapted

    def rotation(self, config: RotationConfig, parameters: Mapping[str, Mapping[str, Tensor]]) -> PeftModel:
        """The base with a rotation of isotune's that has these parameters.

        Args:
            config: of the rotation.
            parameters: as for `fill`.

        Raises:
            AdapterFileError: the configuration does not fit the base, or as `fill`.
        """
        with refused(str(self.folder)):
            model = get_peft_model(self.base, config)
        self.fill(model, parameters)
        return model


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Say which file it is about when PEFT or a configuration refuses something.

    Args:
        what: the file, or the module in it.

    Raises:
        AdapterFileError: something was refused inside of the block.
    """
    try:
        yield
    except AdapterFileError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{what}: {str(error).splitlines()[-1].strip()}") from error


def shared_fields(theirs: Any) -> dict[str, Any]:
    """The fields that every method has, from PEFT's configuration.

    Args:
        theirs: a configuration of PEFT's.
    """
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "task_type",
             "auto_mapping", "revision")  # fmt: skip
    bias = getattr(theirs, "bias", "none")
    return {
        **{name: getattr(theirs, name) for name in names},
        "layers_pattern": theirs.layers_pattern or None,
        "bias": "isotune_only" if bias.endswith("_only") else bias,
    }


def series_terms(terms: int) -> int:
    """Isotune's k for a Neumann series of PEFT's, whose 3 and 4 terms are the same polynomial.

    Args:
        terms: num_cayley_neumann_terms of PEFT, at least 3.
    """
    return max(terms - 2, 2)
