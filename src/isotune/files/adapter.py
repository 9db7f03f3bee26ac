"""Adapter folders: reading one without a model, and placing its layers on a base."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.operator import Adapter
from isotune.errors import AdapterFileError
from isotune.files.base_model import diffusers_class, gguf_of, load_base, loading, resolve_base
from isotune.files.pooled import ENCODER, MeanPooledEncoder, head_of, load_encoder
from isotune.files.tensors import load_tensors
from isotune.internals.peft_quantisation import get_quantization_kwargs
from isotune.internals.safetensors_files import readable
from isotune.internals.transformers_state import forget_quantisation
from isotune.json_files import json_object
from isotune.methods import METHODS
from isotune.methods.config import IsotuneConfig, exactly, type_of
from isotune.model_card import auto_class
from isotune.tuner.backends import adapt
from isotune.tuner.layer import Layer
from isotune.tuner.placing import place_adapter
from isotune.tuner.state import KEY_PREFIX, check_values

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LABELS_FILE = "labels.json"
"""Names of the classes of the head saved in an adapter's folder: {"id2label": {"0": NAME, …}}. transformers keeps them
in config.json, but with that file it would take the folder for a whole model."""
ADAPTER = "default"
"""Name of an adapter that is loaded or imported without one, as in PEFT."""


@dataclass(frozen=True)
class AdapterFile:
    """The content of an isotune adapter folder, without its base model."""

    directory: Path
    config: IsotuneConfig
    layers: dict[str, dict[str, Tensor]]
    """Module name -> its tensors, named as in the layer: "isotune_operator.generator", "isotune_form.pin", …"""
    extras: dict[str, Tensor]
    """All other tensors by name in the file: saved modules, trained biases, embeddings."""

    def operator(self, module: str) -> Adapter:
        """The trained operator of a module, by its name in the file.

        Raises:
            AdapterFileError: the tensors do not fit the config, or the module holds the experts of a mixture.
        """
        self._refuse_experts()
        with self._misfit(module):
            tensors = self._tensors(module, "isotune_operator.")
            with torch.device("meta"):  # a size that only the configuration claims must not be allocated
                trial = self.config.operator_of(module, tensors)
            trial.load_state_dict(tensors, assign=True)
            operator = self.config.operator_of(module, tensors)
            operator.load_state_dict(tensors)
        return operator

    def place(self, base: nn.Module) -> dict[str, Layer]:
        """Build the adapted layers on the weights of a base model, which itself stays unchanged.

        Args:
            base: a plain model. Modules whose names differ only in what precedes them are found too, such as those of
                an encoder alone for an adapter trained on the encoder with a head.

        Returns:
            Module name in the file -> layer, whose adapter is called "default".

        Raises:
            AdapterFileError: the base model lacks a module, or the tensors do not fit it.
            BaseMismatchError: this is not the base model the adapter was trained on.
        """
        self._refuse_experts()
        modules, quantisation = dict(base.named_modules()), get_quantization_kwargs(base)
        layers: dict[str, Layer] = {}
        for name in self.layers:
            layers[name] = self.build(name, adapt(modules[self._find(name, modules)], name, **quantisation))
        place_adapter(ADAPTER, layers.values())
        return layers

    def build(self, module: str, layer: Layer) -> Layer:
        """Add a module's adapter from the file to a layer, as "default" and not placed yet, and return the layer.

        Raises:
            AdapterFileError: the tensors do not fit the layer.
        """
        self.operator(module)
        layer.update_layer(ADAPTER, self.config)
        with self._misfit(module):
            layer.adapter(ADAPTER).load_state_dict(self._tensors(module, "isotune_operator."))
            if ADAPTER in layer.isotune_form:
                layer.isotune_form[ADAPTER].load_state_dict(self._tensors(module, "isotune_form."))
        return layer

    def _refuse_experts(self) -> None:
        if self.config.target_parameters:
            raise AdapterFileError(
                f"{self.directory} adapts the experts of a mixture (target_parameters), which cannot be inspected, "
                "swapped or exported to LoRA; load it with PeftModel.from_pretrained, or export the merged model."
            )

    def _tensors(self, module: str, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.layers[module].items() if name.startswith(prefix)}

    def _misfit(self, module: str) -> contextlib.AbstractContextManager[None]:
        return refused(
            f"{self.directory}: the tensors of {module!r} do not fit {CONFIG_FILE} (",
            "). Check that the two files belong together, or save the adapter again.",
        )

    def _find(self, name: str, modules: Mapping[str, nn.Module]) -> str:
        """The base model's name of a module in the file, or of the only one with the same ending."""
        found: list[str] = []
        for number in range(name.count(".") + 1):
            tail = name.split(".", number)[-1]
            found = [tail] if tail in modules else [other for other in modules if other.endswith("." + tail)]
            if found:
                break
        if len(found) != 1:
            raise AdapterFileError(
                f"{self.directory}: the adapter is on a module {name!r}, which this base model does not have. Give the "
                "base model the adapter was trained on."
            )
        return found[0]


@contextlib.contextmanager
def refused(before: str, after: str = "") -> Iterator[None]:
    """Turn an error of a library or a configuration into an AdapterFileError: `before`, the reason, `after`."""
    try:
        yield
    except AdapterFileError:
        raise
    except (IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).splitlines()
        reason = lines[-1].strip() if lines[0].endswith(":") else lines[0]  # torch lists the mismatches below
        raise AdapterFileError(before + reason + after) from error


def describe(directory: str | os.PathLike[str]) -> AdapterFile:
    """Read an isotune adapter folder without its base model.

    Raises:
        AdapterFileError: there is no such folder, a file is missing or damaged, the weights are a pickle, or the
            adapter is not one of isotune's.
    """
    folder = Path(directory)
    kinds = {f"ISOTUNE_{name.upper()}": config for name, config in METHODS.items()}
    kind = read_config(folder).get("peft_type")
    if not isinstance(kind, str) or kind not in kinds:
        hint = " `isotune import` converts it." if f"ISOTUNE_{kind}" in kinds else ""
        hint = hint or " PEFT loads and merges an adapter of its own: PeftModel.from_pretrained, merge_and_unload."
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}; isotune's own types are {', '.join(kinds)}.{hint}"
        )
    config = kinds[kind].from_pretrained(str(folder))
    layers, extras = read_layers(folder, ("isotune_operator", "isotune_form"))
    for module, tensors in layers.items():
        for name, tensor in tensors.items():
            check_values(f"{module}.{name}", tensor, file=str(folder / WEIGHTS_FILE))
    return AdapterFile(folder, config, layers, extras)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an adapter folder's adapter_config.json, whatever the method.

    Raises:
        AdapterFileError: there is no such folder or no such file, or the file is not JSON.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is not a folder; give an adapter's folder, as save_pretrained wrote it.")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{folder} has no {CONFIG_FILE}, so it is not an adapter that save_pretrained wrote.")
    return IsotuneConfig.from_json_file(str(path))


def read_layers(folder: Path, groups: tuple[str, ...]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Read the tensors of an adapter folder: those of its adapted layers by module, and the rest.

    Args:
        folder: the adapter's folder.
        groups: name parts that follow a module's name if the tensor belongs to the adapter.

    Returns:
        Module name -> rest of the name -> tensor; and name in the file -> tensor.

    Raises:
        AdapterFileError: the file is missing, damaged or a pickle, or holds no adapted layer.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterFileError(
                f"{folder} holds its weights as adapter_model.bin, a pickle, which isotune never opens. If you trust "
                "it, convert it with PEFT: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
            )
        raise AdapterFileError(f"{folder} has no {WEIGHTS_FILE}; copy or save the adapter again.")
    tensors = load_tensors(path, "It is damaged: copy or save the adapter again.")
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(KEY_PREFIX).split(".")
        at = next((i for i, part in enumerate(parts) if part in groups), None)
        if at is None:
            rest[name] = tensor
        else:
            layers.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = tensor
    if not layers:
        raise AdapterFileError(f"{path} holds no adapted layer; save the adapter again.")
    return layers, rest


@contextlib.contextmanager
def new_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which is renamed to `out` when the block succeeds and deleted when it fails.

    Raises:
        ValueError: `out` exists and is not an empty folder, is a symbolic link to nothing, or is where another file
            system begins, which no folder can take the place of.
    """
    target = Path(out)
    if target.is_symlink() and not target.exists():
        raise ValueError(
            f"{target} is a symbolic link to {os.readlink(target)}, which does not exist; make that folder, remove the "
            "link, or choose another place."
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose another place, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    target = target.resolve()  # no folder can take the place of a link to one
    if target.is_mount():
        raise ValueError(f"another file system begins at {target}, so it cannot be made anew; give a folder in it.")
    partial = target.parent / f".{secrets.token_hex(12)}.partial"
    partial.mkdir()
    try:
        yield partial
        readable(*partial.rglob("*.safetensors"))
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def config_of(model: nn.Module, adapter_name: str) -> IsotuneConfig:
    """The configuration of an isotune adapter on a PeftModel, or on a model with injected adapters.

    Raises:
        ValueError: there is no such adapter, or it is not isotune's; names those the model has.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, IsotuneConfig):
        have = {name: type_of(config) for name, config in configs.items()}
        raise ValueError(f"There is no isotune adapter {adapter_name!r} on this model; it has {have or 'none'}.")
    return config


def named_base(
    directory: str | os.PathLike[str], base: nn.Module | str | None = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The base model of an adapter folder: `base` itself, or one loaded with the class the adapter was trained on.

    Args:
        directory: the adapter's folder. Its configuration's `task_type` and `auto_mapping` choose the class, AutoModel
            if neither does; `revision` applies if the base model is the one that the configuration names.
        base: the base model, or its name as in `resolve_base`; None for the one that the configuration names.
        trust_remote_code: whether to run code from the base model's repository.

    Returns:
        The model; if loaded here, it is in evaluation mode, on the CPU and in the dtype of its file.

    Raises:
        ValueError: no model is named, there is no such model, or it cannot be loaded; says why.
    """
    classes, names = head_of(Path(directory) / WEIGHTS_FILE)
    if isinstance(base, nn.Module):
        bare = names and not {f"{ENCODER}{name}" for name in names} & dict(base.named_modules()).keys()
        return MeanPooledEncoder(base, classes) if bare and names <= dict(base.named_modules()).keys() else base
    import transformers

    config = read_config(directory)
    name = str(base or config.get("base_model_name_or_path") or "")
    if not name:
        raise ValueError(
            f"{directory} does not name its base model; give it with base=... in Python or --base on the command line."
        )
    path = resolve_base(name)
    if diffusers_class(path) is not None:
        return load_base(name)
    mapping = config.get("auto_mapping") or {}
    loader = getattr(transformers, auto_class(config.get("task_type")))
    # The file names a module to import: only transformers' own are, since a file must not choose what code runs.
    if str(mapping.get("parent_library", "")).split(".")[0] == "transformers":
        loader = getattr(transformers, str(mapping.get("base_model_class")), loader)
    revision = config.get("revision") if name == config.get("base_model_name_or_path") else None
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code, **gguf_of(path)}
    with loading(name, f" by {loader.__name__}"):
        pooled = False
        if names and loader is transformers.AutoModelForSequenceClassification:
            settings = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            own = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(settings), None)
            pooled = f"{getattr(own, 'base_model_prefix', '')}." != ENCODER
        if classes and not pooled:  # a head of the saved size, whose values come with the adapter
            options |= {"num_labels": classes, "ignore_mismatched_sizes": True}
        model: Any = load_encoder(path, **options) if pooled else loader.from_pretrained(path, **options)
        if gguf_of(path) and not pooled:
            forget_quantisation(model)
    if labels := _labels_of(Path(directory), classes):
        model.config.id2label = labels
        model.config.label2id = {label: index for index, label in labels.items()}
    whole: nn.Module = MeanPooledEncoder(model, classes) if pooled else model
    return whole.eval()


def _labels_of(folder: Path, classes: int) -> dict[int, str]:
    """The class names stored beside an adapter; empty if there are none.

    Raises:
        AdapterFileError: the file is damaged, or its names do not match the classes of the adapter's head.
    """
    file = folder / LABELS_FILE
    if not (classes and file.is_file()):
        return {}
    found = json_object(file, AdapterFileError).get("id2label")
    named = found if isinstance(found, dict) else {}
    labels = {i: named[str(i)] for i in range(classes) if isinstance(named.get(str(i)), str)}
    if not len(labels) == len(named) == classes:
        raise AdapterFileError(
            f"{file} should name the {classes} classes of the adapter's head, but holds {found!r}; correct it, or "
            "remove it."
        )
    return labels


def by_module(option: str, pattern: str, values: Mapping[str, int], usual: int | None = None) -> dict[str, Any]:
    """An option with the usual value, by default the most common one, and the pattern with those of other modules.

    The keys of the pattern are anchored, since one name may end in another.

    Examples:
        >>> by_module("r", "rank_pattern", {"layers.0.q": 4, "layers.0.k": 8, "layers.0.v": 8})
        {'r': 8, 'rank_pattern': {'^layers\\\\.0\\\\.q': 4}}
    """
    usual = Counter(values.values()).most_common(1)[0][0] if usual is None else usual
    return {option: usual, pattern: {exactly(name): value for name, value in values.items() if value != usual}}


def only(modules: Iterable[str]) -> str:
    """The target_modules option for exactly these modules, even if other names end alike."""
    return "|".join(re.escape(name) for name in sorted(modules))
