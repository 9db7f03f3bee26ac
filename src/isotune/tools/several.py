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
    """Add an untrained adapter of any isotune method; `model.add_adapter` accepts only the first adapter's method.

    For everything else use PEFT's own functions: `set_adapter`, `adapter_names`, `save_pretrained`, `delete_adapter`, …

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
    """Load an adapter of any isotune method beside the others; `model.load_adapter` accepts only one method.

    Args:
        model: a PeftModel with an isotune adapter.
        directory: the adapter's folder, as written by save_pretrained.
        adapter_name: a new name for the adapter.
        options: options of `PeftModel.load_adapter`, such as is_trainable=True.

    Raises:
        ValueError: as in `add_adapter`, or the file is damaged or the adapter was trained on another base.

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
        if adapter_name in model.peft_config:  # PEFT would load the tensors and leave the options
            raise ValueError(
                f"The model has an adapter {adapter_name!r}. Choose another name, delete that one first, or exchange "
                "it with isotune.hotswap_adapter, which checks that the two are computed alike."
            )
        model.load_adapter(os.fspath(directory), adapter_name, **options)


@contextmanager
def _open_to(model: PeftModel, config: IsotuneConfig) -> Iterator[None]:
    """Within this block, let a model with adapters of one isotune method accept another method."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, IsotuneModel):
        raise ValueError(
            f"A {type(model).__name__} was given; give a PeftModel with an isotune adapter, as get_peft_model returns "
            "it. A transformers model accepts several methods through its own add_adapter and load_adapter."
        )
    if not isinstance(config, IsotuneConfig):
        raise ValueError(f"{type(config).__name__} is not one of isotune's configurations; give one of those.")
    # PEFT compares the new adapter's type with the first one's, but all isotune methods share one tuner model.
    first, model.peft_type = model.peft_type, config.peft_type
    try:
        yield
    finally:
        model.peft_type = first
