"""Finding and loading the base model that an adapter names: a folder, a Hub name, or the model inside a package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from isotune.errors import IsotuneWarning
from isotune.internals.transformers_state import forget_quantisation

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the libraries say about a head that is new on purpose, and their loading bars."""
    from transformers import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", IsotuneWarning)  # the noise is the other libraries'
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


def resolve_base(name: str) -> str:
    """The folder or Hub name that `name` stands for.

    Args:
        name: a folder with a config.json or one GGUF file, a Hub name such as "facebook/opt-125m", or "package:NAME"
            for the model of an installed package: the folder `model` beside its `__init__`, or the GGUF file that its
            function `assemble` writes, kept under ~/.cache/isotune/models.

    Raises:
        ValueError: there is no such folder or package, or no model in it.
    """
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            raise ValueError(f"The package {package!r} is not installed: pip install {package.replace('_', '-')}")
        folder = Path(spec.origin).parent / "model"
        if (folder / "config.json").is_file():
            return str(folder)
        assembled = _assembled(package)
        if assembled is None:
            raise ValueError(f"The package {package!r} carries no model: there is no {folder / 'config.json'}.")
        return str(assembled)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not gguf_of(str(folder)):
            raise ValueError(f"The folder {name!r} holds no model: there is no config.json in it.")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name!r}; give a model's folder, a Hub name, or package:NAME.")
    return name


def gguf_of(path: str) -> dict[str, str]:
    """What `from_pretrained` must be given besides for a folder with one GGUF file and no config.json.

    Args:
        path: the folder; nothing for any other path.

    Returns:
        {"gguf_file": its name}, or nothing.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return {}
    files = sorted(file.name for file in folder.glob("*.gguf"))
    return {"gguf_file": files[0]} if len(files) == 1 else {}


def _assembled(package: str) -> Path | None:
    """The folder of the GGUF file that a package puts together by its function `assemble`: made once, then kept."""
    assemble = getattr(importlib.import_module(package), "assemble", None)
    if assemble is None:
        return None
    folder = Path("~/.cache/isotune/models").expanduser() / package
    if not gguf_of(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        # Under a name that is no model's until it is whole: another process may look for it, and this one be stopped.
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(assemble(Path(place) / "model.gguf"))
            os.replace(made, folder / "model.gguf")
    return folder


def load_base(name: str, adapter_config: Mapping[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """Load a base model with the class that the adapter was trained on, as far as its config says.

    Args:
        name: as in `resolve_base`.
        adapter_config: the adapter's; `task_type`, `auto_mapping` and, for the model that it names itself, `revision`
            are looked at. Without a task type and without a class of transformers' own, AutoModel loads it.
        trust_remote_code: run code that the model's repository carries.

    Returns:
        The model in evaluation mode, on the CPU, in the dtype of its file.

    Raises:
        ValueError: there is no such model, or it cannot be loaded; says why.
    """
    import transformers

    path = resolve_base(name)
    mapping = adapter_config.get("auto_mapping") or {}
    own_class = None
    # The file says which module to import; only transformers' own, as a file must not choose what code runs.
    if str(mapping.get("parent_library", "")).split(".")[0] == "transformers":
        own_class = getattr(transformers, str(mapping.get("base_model_class")), None)
    task = adapter_config.get("task_type")
    loader = own_class or getattr(transformers, _AUTO_CLASSES.get(str(task), "AutoModel"))
    revision = adapter_config.get("revision") if name == adapter_config.get("base_model_name_or_path") else None
    try:
        with quiet():
            model = loader.from_pretrained(
                path, revision=revision or "main", trust_remote_code=trust_remote_code, **gguf_of(path)
            )
        if gguf_of(path):
            forget_quantisation(model)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"The base model {name!r} cannot be loaded by {loader.__name__}: {lines[0]}") from error
    result: nn.Module = model.eval()
    return result
