"""Adapters in forms that need no isotune: an ordinary LoRA folder, and a plain model with the update merged in."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn

from isotune.adapter_file import (
    KEY_PREFIX,
    WEIGHTS_FILE,
    adapted_layers,
    describe,
    named_base,
    new_directory,
    rank_pattern,
)
from isotune.base_model import resolve_base
from isotune.config import IsotuneConfig
from isotune.layer import Layer, warn_of_requantising

_TOKENIZER_FILES = (
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
)
_BIAS = {"none": "none", "all": "all", "isotune_only": "lora_only"}

Source = nn.Module | str | os.PathLike[str]


def export_lora(
    model_or_dir: Source,
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write an adapter as an ordinary PEFT LoRA folder: the same function, exactly, at the same rank.

    B (out, r) and A (r, in) with lora_alpha = r, so a scaling of 1. Saved modules, trained biases and embeddings are
    written as they are. Plain PEFT loads the folder; isotune need not be installed.

    Args:
        model_or_dir: a model with isotune adapters, merged or not, or the folder of a saved one.
        out: the folder to write; it appears only when it is complete.
        adapter_name: which adapter of a model.
        base: for a folder: the base model, or its name; by default what the adapter's config names.
        trust_remote_code: run code that the base model's repository carries.

    Raises:
        ValueError: `out` is not empty, there is no such adapter or base, or the adapter does not fit the base.
    """
    if isinstance(model_or_dir, nn.Module):
        config = _config(model_or_dir, adapter_name)
        layers, name = dict(adapted_layers(model_or_dir, adapter_name)), adapter_name
        state = get_peft_model_state_dict(model_or_dir, adapter_name=adapter_name)
        extras = {k: tensor for k, tensor in state.items() if ".isotune_" not in k}
    else:
        file = describe(model_or_dir)
        config, extras, name = file.config, file.extras, "default"
        plain = (
            base if isinstance(base, nn.Module) else named_base(model_or_dir, base, trust_remote_code=trust_remote_code)
        )
        layers = file.place(plain)
    tensors = {KEY_PREFIX + k.removeprefix(KEY_PREFIX): tensor for k, tensor in extras.items()}
    ranks: dict[str, int] = {}
    for module, layer in layers.items():
        if layer.host.folds:
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(
                f"The adapted module {module!r} is a {kind}, and only linear layers can be exported as LoRA; export "
                "the merged model instead (--to merged)."
            )
        up, down = layer.low_rank(name)
        ranks[module] = len(down)
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = up
    # Cloned: safetensors refuses tensors that share memory, as tied embeddings do.
    tensors = {k: tensor.detach().cpu().clone().contiguous() for k, tensor in tensors.items()}
    with new_directory(out) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        _lora_config(config, layers, ranks).save_pretrained(str(folder))


def export_merged(
    model_or_dir: Source,
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write a plain transformers model with the adapter's update in its weights, with the tokeniser where there is one.

    Args:
        model_or_dir: a model with isotune adapters, which is left as it was, or the folder of a saved one.
        out: the folder to write; it appears only when it is complete.
        adapter_name: which adapter of a model.
        base: for a folder: the base model, or its name; by default what the adapter's config names.
        trust_remote_code: run code that the base model's repository carries.

    Raises:
        ValueError: as `export_lora`; or the model cannot save itself; or other adapters are merged into it.
    """
    sources: list[str] = []
    if isinstance(model_or_dir, nn.Module):
        model = model_or_dir
    else:
        describe(model_or_dir)  # its messages are clearer than what PEFT finds while loading
        plain = (
            base if isinstance(base, nn.Module) else named_base(model_or_dir, base, trust_remote_code=trust_remote_code)
        )
        model, adapter_name = PeftModel.from_pretrained(plain, os.fspath(model_or_dir)), "default"
        sources = [os.fspath(model_or_dir)]
    config = _config(model, adapter_name)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(inner, "save_pretrained"):
        raise ValueError(f"A {type(inner).__name__} has no save_pretrained; only a transformers model can be exported.")
    named = base if isinstance(base, str) else getattr(inner, "name_or_path", None) or config.base_model_name_or_path
    with new_directory(out) as folder:
        with _merged_and_bare(inner, adapter_name):
            inner.save_pretrained(str(folder))
        _copy_tokenizer([*sources, *([str(named)] if named else [])], folder)


def _config(model: nn.Module, adapter_name: str) -> IsotuneConfig:
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, IsotuneConfig):
        have = {name: str(getattr(c, "peft_type", c)) for name, c in configs.items()}
        raise ValueError(f"There is no isotune adapter {adapter_name!r} on this model; it has {have or 'none'}.")
    return config


def _lora_config(config: IsotuneConfig, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> LoraConfig:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = rank_pattern(ranks, rank)
    saved = config.modules_to_save
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=sorted(layers),
        fan_in_fan_out=any(getattr(layer.host, "transposed", False) for layer in layers.values()),
        bias=_BIAS[config.bias],  # type: ignore[arg-type]
        modules_to_save=None if saved is None else list(dict.fromkeys(saved)),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )


@contextmanager
def _merged_and_bare(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """For the time of the block: the update in the weights, and the model's own modules in the places of wrappers."""
    for name, module in model.named_modules():
        if isinstance(module, Layer) and module.merged and module.merged_adapters != [adapter_name]:
            raise ValueError(f"{name!r} has {module.merged_adapters} merged; call unmerge_adapter() first.")
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    merged_here: list[Layer] = []
    try:
        for _, layer in adapted_layers(model, adapter_name):
            if not layer.merged:
                layer.merge(adapter_names=[adapter_name])
                merged_here.append(layer)
        warn_of_requantising(merged_here)
        for name, module in list(model.named_modules()):
            if isinstance(module, Layer):
                plain = module.base_layer
            elif isinstance(module, ModulesToSaveWrapper):
                own = adapter_name in module.modules_to_save
                plain = module.modules_to_save[adapter_name] if own else module.original_module
            else:
                continue
            parent, _, attribute = name.rpartition(".")
            owner = model.get_submodule(parent)
            swapped.append((owner, attribute, module))
            setattr(owner, attribute, plain)
        with torch.no_grad():
            yield
    finally:
        for owner, attribute, module in swapped:
            setattr(owner, attribute, module)
        for layer in merged_here:
            layer.unmerge()


def _copy_tokenizer(sources: list[str], folder: Path) -> None:
    """Copy the files of the first source that has any; one that cannot be reached has none."""
    from transformers.utils import cached_file

    for source in sources:
        found = []
        for file in _TOKENIZER_FILES:
            try:
                place = source if source in sources[:-1] else resolve_base(source)
                path = cached_file(place, file, _raise_exceptions_for_missing_entries=False)
            except (OSError, ValueError):
                path = None
            if path is not None:
                found.append(path)
        for path in found:
            shutil.copyfile(path, folder / Path(path).name)
        if found:
            return
