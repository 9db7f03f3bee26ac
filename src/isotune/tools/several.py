"""Adapters of different methods on one PeftModel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from isotune.files.adapter import describe
from isotune.methods.config import IsotuneConfig
from isotune.tuner.model import IsotuneModel


def add_adapter(model: PeftModel, adapter_name: str, config: IsotuneConfig) -> None:
    """Add an untrained adapter of any isotune method; `model.add_adapter` takes those of the first one's method only.

    Everything else is PEFT's own: `set_adapter`, `adapter_names`, `save_pretrained`, `delete_adapter`, …

    Raises:
        ValueError: the model has no isotune adapter, the name is taken, or the adapter does not fit.

    Examples:
        >>> import torch
        >>> from isotune import HRAConfig, OFTConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), OFTConfig(r=2, target_modules=["0"]))
        >>> add_adapter(model, "reflections", HRAConfig(r=2, target_modules=["0"]))
        >>> sorted(model.peft_config)
        ['default', 'reflections']
    """
    with _open_to(model, config):
        model.add_adapter(adapter_name, config)


def load_adapter(model: PeftModel, directory: str | os.PathLike[str], adapter_name: str, **options: Any) -> None:
    """Load an adapter of any isotune method beside the others, as `model.load_adapter` does for those of one method.

    Args:
        model: one with an isotune adapter.
        directory: the folder that save_pretrained wrote for that adapter.
        adapter_name: a new name.
        options: of `PeftModel.load_adapter`, such as is_trainable=True.

    Raises:
        ValueError: as `add_adapter`, or the file is damaged or was trained on another base.

    Examples:
        >>> import tempfile, torch
        >>> from isotune import HRAConfig, OFTConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> saved = get_peft_model(base, HRAConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved.save_pretrained(folder)
        ...     model = get_peft_model(saved.unload(), OFTConfig(r=2, target_modules=["0"]))
        ...     load_adapter(model, folder, "reflections")
        >>> sorted(model.peft_config)
        ['default', 'reflections']
    """
    with _open_to(model, describe(directory).config):
        model.load_adapter(os.fspath(directory), adapter_name, **options)


@contextmanager
def _open_to(model: PeftModel, config: IsotuneConfig) -> Iterator[None]:
    """For the time of the block, let a model with adapters of one isotune method accept one of another."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, IsotuneModel):
        raise ValueError(
            f"A {type(model).__name__} was given; a PeftModel with an isotune adapter is needed, as get_peft_model "
            "returns it. A transformers model takes several methods by its own add_adapter and load_adapter."
        )
    if not isinstance(config, IsotuneConfig):
        raise ValueError(f"{type(config).__name__} is not a configuration of isotune's, whose layers it would not fit.")
    # PEFT compares the new adapter's type with that of the first; all isotune methods share one tuner model.
    first, model.peft_type = model.peft_type, config.peft_type
    try:
        yield
    finally:
        model.peft_type = first
