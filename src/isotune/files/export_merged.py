"""Exporting an adapter as a plain model with the update merged in, which needs no isotune."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from isotune.files.adapter import ADAPTER, config_of, describe, named_base, new_directory
from isotune.files.base_model import copy_tokenizer, resolve_base
from isotune.files.pooled import MeanPooled
from isotune.tuner.adapted_model import stand_ins
from isotune.tuner.layer import Layer
from isotune.tuner.merging import warn_of_requantising
from isotune.tuner.state import adapted_layers


def export_merged(
    model_or_dir: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write a plain transformers model with the adapter's update in its weights, and the tokeniser if there is one.

    A classifier on the mean of an encoder's hidden states, as isotune's recipes train it on a sentence-transformers
    model, is written as a sentence-transformers folder, whose `encode` gives the logits; AutoModel reads its encoder.

    `out`, `adapter_name`, `base` and `trust_remote_code` are as in `export_lora`.

    Args:
        model_or_dir: a model with isotune adapters, which is left as it was, or the folder of a saved adapter.

    Raises:
        ValueError: `out` is not empty, there is no such adapter or base, the adapter does not fit the base, the model
            cannot save itself, or other adapters are merged into it.
    """
    sources: list[str] = []
    if isinstance(model_or_dir, nn.Module):
        model = model_or_dir
    else:
        describe(model_or_dir)  # its error messages are clearer than PEFT's on loading
        plain = named_base(model_or_dir, base, trust_remote_code=trust_remote_code)
        model, adapter_name = PeftModel.from_pretrained(plain, os.fspath(model_or_dir)), ADAPTER
        sources.append(os.fspath(model_or_dir))
    config = config_of(model, adapter_name)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, MeanPooled) and not hasattr(inner, "save_pretrained"):
        raise ValueError(f"A {type(inner).__name__} has no save_pretrained; only a transformers model can be exported.")
    named = base if isinstance(base, str) else getattr(inner, "name_or_path", None) or config.base_model_name_or_path
    with new_directory(out) as folder:
        with _merged_and_bare(inner, adapter_name):
            if isinstance(inner, MeanPooled):
                inner.save_for_others(folder)
            else:
                _save(inner, folder)
        if named:
            with suppress(OSError, ValueError):
                sources.append(resolve_base(str(named)))
        copy_tokenizer(sources, folder)


def _save(model: Any, folder: Path) -> None:
    try:
        model.save_pretrained(str(folder))
    except NotImplementedError as error:
        raise ValueError(
            "transformers cannot save this model in the form it was loaded in, such as quantised to 4 bits "
            f"({error or type(error).__name__}). Give the base model it was quantised from: --base FULL."
        ) from error


@contextmanager
def _merged_and_bare(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Within this block, merge the update into the weights and replace all wrappers by the model's own modules."""
    for name, module in model.named_modules():
        if isinstance(module, Layer) and module.merged and module.merged_adapters != [adapter_name]:
            raise ValueError(f"{name!r} has {module.merged_adapters} merged; call unmerge_adapter() first.")
    with ExitStack() as undo:
        merged_here = [layer for _, layer in adapted_layers(model, adapter_name) if not layer.merged]
        for layer in merged_here:
            layer.merge(adapter_names=[adapter_name])
            undo.callback(layer.unmerge)
        warn_of_requantising(merged_here)
        for owner, name, module, original in stand_ins(model):
            plain = original
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                plain = module.modules_to_save[adapter_name]
            undo.callback(setattr, owner, name, module)
            setattr(owner, name, plain)
        with torch.no_grad():
            yield
