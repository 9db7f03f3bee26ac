"""The weights of a fine-tuned model beside its base, read one at a time where the files allow it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isotune.files.base_model import load_base, resolve_base, why_not_loaded
from isotune.json_files import json_object

_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a fine-tuned model by their names in its base model."""

    keys: Mapping[str, str]
    """Name in the base model -> name in the fine-tuned model."""
    alone: tuple[str, ...]
    """Names of the fine-tuned model's tensors that the base does not have."""
    read: Callable[[str], Tensor]
    """Reads a tensor by its name in the fine-tuned model."""

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """The tensor with this name in the base model, where it is `like`.

        Raises:
            ValueError: the fine-tuned model has no such tensor, or one of another shape.
        """
        if name not in self.keys:
            raise ValueError(
                f"The fine-tuned model has no tensor {name!r}, which its base has. Give two checkpoints of one "
                "architecture."
            )
        found = self.read(self.keys[name])
        if found.shape != like.shape or not found.is_floating_point():
            raise ValueError(
                f"{name!r} has shape {tuple(like.shape)} in the base model, and {tuple(found.shape)} as {found.dtype} "
                "in the fine-tuned one. Give two checkpoints of one architecture that are not quantised, or leave the "
                "module out with exclude_modules."
            )
        return found


def open_checkpoint(
    tuned: nn.Module | str, names: Collection[str], needed: Iterable[str], prefix: str = ""
) -> Checkpoint:
    """Open a fine-tuned model: its safetensors files, or where their names are others than the base's, all of it.

    Args:
        tuned: a model, or its folder, Hub name or package:NAME.
        names: names of the parameters and buffers of the plain base model.
        needed: those of them that have to be there.
        prefix: name of the model within its head, by which names may differ, as transformers' base_model_prefix says.

    Raises:
        ValueError: there is no such model, or it is damaged.
    """
    if isinstance(tuned, str):
        files = _files_of(tuned)
        keys = _matched(names, prefix, files)
        if files and all(name in keys for name in needed):
            return Checkpoint(keys, _others(files, keys), lambda key: _from_file(files[key], key))
        tuned = load_base(tuned)
    state = tuned.state_dict()
    keys = _matched(names, prefix, state)
    return Checkpoint(keys, _others(state, keys), lambda key: state[key].detach())


def _matched(names: Iterable[str], prefix: str, given: Collection[str]) -> dict[str, str]:
    """Names of the base model -> names given, which differ at most by the name of the model within its head."""
    found: dict[str, str] = {}
    for name in names:
        for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if key in given:
                found[name] = key
                break
    return found


def _others(given: Iterable[str], keys: Mapping[str, str]) -> tuple[str, ...]:
    taken = set(keys.values())
    return tuple(name for name in given if name not in taken)


def _files_of(name: str) -> dict[str, Path]:
    """The tensors in a model's safetensors files: name -> file; empty if it has none."""
    path = Path(resolve_base(name))
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"The model {name!r} cannot be read: {why_not_loaded(error)}") from error
    indices, files = list(path.glob(f"*{_INDEX}")), list(path.glob("*.safetensors"))
    if len(indices) == 1:
        listed = json_object(indices[0]).get("weight_map")
        return {str(key): path / str(file) for key, file in dict(listed or {}).items()}
    if len(files) != 1:
        return {}
    try:
        with safe_open(files[0], framework="pt") as opened:
            return dict.fromkeys(opened.keys(), files[0])
    except SafetensorError as error:
        raise ValueError(f"The model {name!r} cannot be read: {why_not_loaded(error)}") from error


def _from_file(file: Path, key: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {why_not_loaded(error)}") from error
    return tensor
