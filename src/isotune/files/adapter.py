"""Adapter folders: reading one without a model, and placing its layers on a base."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_quantization_kwargs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from isotune.adapter.operator import Adapter
from isotune.errors import AdapterFileError
from isotune.files.base_model import load_base
from isotune.methods import METHODS
from isotune.methods.config import IsotuneConfig
from isotune.tuner.backends import adapt
from isotune.tuner.layer import Layer
from isotune.tuner.placing import place_adapter
from isotune.tuner.state import KEY_PREFIX as KEY_PREFIX
from isotune.tuner.state import adapted_layers as adapted_layers
from isotune.tuner.state import check_tensors as check_tensors
from isotune.tuner.state import check_values
from isotune.tuner.state import named_tensors as named_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER = "default"
"""Name given to an adapter that is loaded or imported without one, as PEFT does."""


@dataclass(frozen=True)
class AdapterFile:
    """What an isotune adapter folder holds, without its base model."""

    directory: Path
    config: IsotuneConfig
    layers: dict[str, dict[str, Tensor]]
    """Module name -> its tensors, named as in the layer: "isotune_operator.generator", "isotune_form.pin", …"""
    extras: dict[str, Tensor]
    """All other tensors by their name in the file: saved modules, trained biases, embeddings."""

    def operator(self, module: str) -> Adapter:
        """The trained operator of a module.

        Args:
            module: its name in the file.

        Raises:
            AdapterFileError: the tensors do not fit the config.
        """
        self._refuse_experts()
        self._check_operator(module)
        operator = self.config.operator_of(module, self._tensors(module, "isotune_operator."))
        self._load(operator, module, "isotune_operator.")
        return operator

    def _check_operator(self, module: str) -> None:
        """Compare the file with the configuration before anything of the size that this declares is made."""
        try:
            with torch.device("meta"):
                operator = self.config.operator_of(module, self._tensors(module, "isotune_operator."))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise self._misfit(module, str(error).splitlines()[0]) from error
        self._load(operator, module, "isotune_operator.", assign=True)

    def _refuse_experts(self) -> None:
        if self.config.target_parameters:
            raise AdapterFileError(
                f"{self.directory} adapts the experts of a mixture (target_parameters), which cannot be inspected, "
                "swapped or exported to LoRA; load it with PeftModel.from_pretrained, or export the merged model."
            )

    def _tensors(self, module: str, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.layers[module].items() if name.startswith(prefix)}

    def _load(self, target: nn.Module, module: str, prefix: str, *, assign: bool = False) -> None:
        try:
            target.load_state_dict(self._tensors(module, prefix), assign=assign)
        except RuntimeError as error:
            raise self._misfit(module, str(error).splitlines()[-1].strip()) from error

    def _misfit(self, module: str, detail: str) -> AdapterFileError:
        return AdapterFileError(
            f"{self.directory}: the tensors of {module!r} are not what {CONFIG_FILE} says ({detail}). "
            "Check that the two files belong together, or save the adapter again."
        )

    def place(self, base: nn.Module) -> dict[str, Layer]:
        """Build the adapted layers on the weights of a base model, which itself stays as it is.

        Args:
            base: a plain model. Where its modules are the adapter's but for what precedes their names (an encoder
                alone, for an adapter trained on it with a head), they are found all the same.

        Returns:
            Module name in the file -> layer, whose adapter is called "default".

        Raises:
            AdapterFileError: a module is not there, or the tensors do not fit it.
            BaseMismatchError: this is another base than the one trained on.
        """
        self._refuse_experts()
        modules, quantisation = dict(base.named_modules()), get_quantization_kwargs(base)
        layers: dict[str, Layer] = {}
        for name in self.layers:
            layers[name] = self.build(name, adapt(modules[self._find(name, modules)], name, **quantisation))
        place_adapter(ADAPTER, layers.values())
        return layers

    def build(self, module: str, layer: Layer) -> Layer:
        """Add the adapter to a layer as "default", its form not placed yet; returns the layer.

        Args:
            module: its name in the file.
            layer: without that adapter.

        Raises:
            AdapterFileError: the tensors do not fit the layer.
        """
        self._check_operator(module)
        layer.update_layer(ADAPTER, self.config)
        self._load(layer.adapter(ADAPTER), module, "isotune_operator.")
        if ADAPTER in layer.isotune_form:
            self._load(layer.isotune_form[ADAPTER], module, "isotune_form.")
        return layer

    def _find(self, name: str, modules: Mapping[str, nn.Module]) -> str:
        parts = name.split(".")
        for drop in range(len(parts)):
            tail = ".".join(parts[drop:])
            found = [tail] if tail in modules else [other for other in modules if other.endswith("." + tail)]
            if len(found) == 1:
                return found[0]
            if found:
                break
        raise AdapterFileError(
            f"{self.directory}: the adapter is on a module {name!r}, which this base model does not have. Give the "
            "base model that it was trained on."
        )


def describe(directory: str | os.PathLike[str]) -> AdapterFile:
    """Read an isotune adapter folder without its base model.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
        AdapterFileError: no such folder, a file missing or damaged, weights in a pickle, or another method's adapter.
    """
    folder = Path(directory)
    raw = read_config(folder)
    kinds = {f"ISOTUNE_{name.upper()}": config for name, config in METHODS.items()}
    kind = raw.get("peft_type")
    if kind not in kinds:
        hint = " `isotune import` converts it." if f"ISOTUNE_{kind}" in kinds else ""
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}; isotune's own are {', '.join(kinds)}.{hint}"
        )
    try:
        config = kinds[kind].from_pretrained(str(folder))
    except TypeError as error:
        raise AdapterFileError(f"{folder / CONFIG_FILE} is not a configuration of {kind}: {error}") from error
    layers, extras = by_module(read_tensors(folder), ("isotune_operator", "isotune_form"))
    if not layers:
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} holds no adapted layer; save the adapter again.")
    for module, tensors in layers.items():
        for name, tensor in tensors.items():
            check_values(f"{module}.{name}", tensor, file=str(folder / WEIGHTS_FILE))
    return AdapterFile(folder, config, layers, extras)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an adapter folder's adapter_config.json, whatever the method.

    Args:
        directory: the folder.

    Raises:
        AdapterFileError: no such folder, or no such file, or not JSON.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is not a folder; give the one that save_pretrained wrote.")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{folder} has no {CONFIG_FILE}, so it is not an adapter that save_pretrained wrote.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise AdapterFileError(f"{path} is damaged: it is nested too deeply. Copy or save the adapter again.") from None
    except ValueError as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Copy or save the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} is damaged: it holds no object. Copy or save the adapter again.")
    return content


@contextlib.contextmanager
def new_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends well, and vanishes otherwise.

    Args:
        out: the folder that is wanted; its parents are made.

    Raises:
        ValueError: `out` exists and is not an empty folder.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose another place, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder by their name in the file, whatever the method.

    Args:
        folder: with adapter_model.safetensors.

    Raises:
        AdapterFileError: no such file, or damaged, or a pickle.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterFileError(
                f"{folder} holds its weights as adapter_model.bin, a pickle, which isotune never opens. If you trust "
                "it, convert it with PEFT: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
            )
        raise AdapterFileError(f"{folder} has no {WEIGHTS_FILE}; copy or save the adapter again.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Copy or save the adapter again.") from error
    return tensors


def by_module(
    tensors: Mapping[str, Tensor], groups: tuple[str, ...]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split a file into the tensors of its adapted layers, by module, and the rest.

    Args:
        tensors: by their name in the file.
        groups: what follows a module's name where the tensor is the adapter's.

    Returns:
        Module name -> name behind it -> tensor; and name in the file -> tensor.

    Example:
        >>> names = ["base_model.model.q.isotune_operator.angles", "base_model.model.head.weight"]
        >>> layers, rest = by_module(dict.fromkeys(names, torch.zeros(1)), ("isotune_operator",))
        >>> {module: list(tensors) for module, tensors in layers.items()}, list(rest)
        ({'q': ['isotune_operator.angles']}, ['base_model.model.head.weight'])
    """
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(KEY_PREFIX).split(".")
        at = next((i for i, part in enumerate(parts) if part in groups), None)
        if at is None:
            rest[name] = tensor
        else:
            layers.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = tensor
    return layers, rest


def config_of(model: nn.Module, adapter_name: str) -> IsotuneConfig:
    """The configuration of an isotune adapter on a model.

    Args:
        model: a PeftModel, or a model with injected adapters.
        adapter_name: the adapter.

    Raises:
        ValueError: there is no such adapter, or it is not isotune's; names those there are.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, IsotuneConfig):
        have = {name: str(getattr(c, "peft_type", c)) for name, c in configs.items()}
        raise ValueError(f"There is no isotune adapter {adapter_name!r} on this model; it has {have or 'none'}.")
    return config


def named_base(
    directory: str | os.PathLike[str], base: nn.Module | str | None = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The base model of an adapter folder: `base` itself, or loaded by that name or the one in the adapter's config.

    Args:
        directory: the adapter's folder.
        base: the base model, or its name; None for the one that the adapter's config names.
        trust_remote_code: run code that the base model's repository carries.

    Raises:
        ValueError: neither names one, or it cannot be loaded.
    """
    if isinstance(base, nn.Module):
        return base
    raw = read_config(directory)
    name = base or raw.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{directory} does not name its base model; give it: base=... in Python, --base on the command line."
        )
    return load_base(str(name), raw, trust_remote_code=trust_remote_code)


def rank_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """The pattern for those modules whose rank is not the default; anchored, as one name may end in another.

    Args:
        ranks: module name -> rank.
        default: the rank that needs no pattern.

    Example:
        >>> rank_pattern({"layers.0.q": 4, "layers.0.k": 8}, 8)
        {'^layers\\\\.0\\\\.q': 4}
    """
    return {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != default}
