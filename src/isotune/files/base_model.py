"""Finding base models: a folder, a Hub name, or the model inside a package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from isotune.errors import IsotuneWarning

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
        return str(_model_of(name.removeprefix("package:")))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not gguf_of(str(folder)):
            raise ValueError(f"The folder {name!r} holds no model: there is no config.json in it.")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name!r}; give a model's folder, a Hub name, or package:NAME.")
    return name


def gguf_of(path: str) -> dict[str, str]:
    """What `from_pretrained` must be given besides for a folder with one GGUF file and no config.json: its name."""
    files = list(Path(path).glob("*.gguf"))
    alone = len(files) == 1 and not (Path(path) / "config.json").is_file()
    return {"gguf_file": files[0].name} if alone else {}


def _model_of(package: str) -> Path:
    """The folder of the model in a package; what its function `assemble` puts together is made once, then kept."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(f"The package {package!r} is not installed: pip install {package.replace('_', '-')}")
    carried = Path(spec.origin).parent / "model"
    if (carried / "config.json").is_file():
        return carried
    assemble = getattr(importlib.import_module(package), "assemble", None)
    if assemble is None:
        raise ValueError(f"The package {package!r} carries no model: there is no {carried / 'config.json'}.")
    kept = Path("~/.cache/isotune/models").expanduser() / package
    if not gguf_of(str(kept)):
        kept.mkdir(parents=True, exist_ok=True)
        # Under a name that is no model's until it is whole: another process may look for it, and this one be stopped.
        with tempfile.TemporaryDirectory(dir=kept) as place:
            Path(assemble(Path(place) / "model.gguf")).replace(kept / "model.gguf")
    return kept


def copy_tokenizer(sources: list[str], folder: Path) -> None:
    """Copy the tokeniser of the first folder or Hub name that has one; one that cannot be reached has none."""
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
