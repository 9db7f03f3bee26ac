"""Models that cannot take an adapter, refused before anything is changed, and names that are likely mistakes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from difflib import get_close_matches

from torch import nn

from isotune.errors import IsotuneWarning
from isotune.methods.config import IsotuneConfig
from isotune.parallel.processes import loaded_by_one
from isotune.parallel.sharding import is_sharded
from isotune.tuner.layer import Layer


def refuse_divided(model: nn.Module) -> None:
    """Refuse a tensor-parallel model that does not say how its weights are split."""
    size = getattr(model, "_tp_size", None) or 1
    if size > 1 and not any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"The weights of this model are split by rows or columns between {size} devices (tensor parallelism), "
            "and this version of transformers does not say how. Upgrade to transformers 5.17 or later, or load the "
            "model without a tensor parallel plan and shard it with FSDP2."
        )


def refuse_loading_by_one(model: nn.Module) -> None:
    """Refuse an adapter with a basis if accelerate will send only parameters to the other processes."""
    if not loaded_by_one() or any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()):
        return  # every process loads four-bit weights itself
    raise ValueError(
        "fsdp_cpu_ram_efficient_loading is on: one process per machine loads the weights and accelerate sends them to "
        "the others when it shards the model, but it cannot send the basis that this adapter keeps beside its "
        "parameters. Turn it off with fsdp_cpu_ram_efficient_loading: false in accelerate's configuration file "
        "(accelerate launch turns it on by default), or use a method without a basis, such as OFT."
    )


def refuse_names_of_saved(model: nn.Module, configs: Mapping[str, IsotuneConfig]) -> None:
    """Refuse saved modules inside one another, and an adapter with the name of a part of one.

    PEFT would confuse their names: it would leave a part out of the file, write it under a wrong name, or fail with a
    KeyError when the trained adapter is saved.
    """
    asked = {name for config in configs.values() for name in config.modules_to_save or ()}
    saved = {
        name: module for name, module in model.named_modules() if any(f".{name}".endswith(f".{own}") for own in asked)
    }
    for name, outer in itertools.product(saved, saved):
        if name.startswith(f"{outer}."):
            inner = name.replace(".original_module.", ".")
            raise ValueError(
                f"{inner!r} lies within {outer!r}, and PEFT cannot save both with adapters (modules_to_save). Name "
                f"only one of them, the same one in every adapter: {outer!r} contains the other."
            )
    for name, module in saved.items():
        original: nn.Module = getattr(module, "original_module", module)
        tensors = itertools.chain(original.named_parameters(), original.named_buffers())
        parts = {part for key, _ in tensors for part in f"{name}.{key}".split(".")}
        if called := parts & configs.keys():
            raise ValueError(
                f"The adapter name {min(called)!r} is not allowed: {name!r}, which modules_to_save saves with an "
                "adapter, has a part of that name, and PEFT would not save it. Choose another name."
            )


def refuse_loading_onto_disk(model: nn.Module, adapter_name: str, config: IsotuneConfig) -> None:
    """Refuse a file's adapter on layers on disk where transformers loads it, which leaves those tensors out."""
    if config.origin is not None or "isotune_format" not in config.given:
        return  # loaded by PEFT, or made here: only a file says its format
    devices = getattr(model, "hf_device_map", None) or {}
    on_disk = tuple(f"{path}." if path else "" for path, device in devices.items() if device == "disk")
    for layer in model.modules():
        if isinstance(layer, Layer) and adapter_name in layer.configs and f"{layer.key}.".startswith(on_disk):
            raise ValueError(
                f"{layer.key!r} is on disk, and transformers loads no adapter's tensors for such a layer. Load the "
                "base model alone and then the adapter by peft.PeftModel.from_pretrained, or keep the layer in memory. "
                "For a new adapter, make a new configuration instead of reading one."
            )


def refuse_several_places(model: nn.Module) -> None:
    """Refuse a model that uses one adapted module in several places, since PEFT injects into only one of them."""
    adapted = {id(m.base_layer): m.key for m in model.modules() if isinstance(m, Layer)}
    for name, module in model.named_modules(remove_duplicate=False):
        key = adapted.get(id(module))
        if key is not None and not name.endswith(".base_layer"):
            raise ValueError(
                f"The target module {key!r} is the same object as {name!r}, so an adapter would act in one place but "
                "be merged into all. Exclude the module with exclude_modules, or give each place a copy of its own."
            )


def warn_of_lists(model: nn.Module, adapter_name: str) -> None:
    """Warn of newly adapted layers that a module holds in a plain list too: what it calls there has no adapter."""
    layers = (m for m in model.modules() if isinstance(m, Layer))
    adapted = {id(layer.base_layer): layer.key for layer in layers if list(layer.configs) == [adapter_name]}
    for module in model.modules():
        for attribute, held in vars(module).items():
            if attribute == "_modules" or not isinstance(held, dict | list | tuple):
                continue
            for one in held.values() if isinstance(held, dict) else held:
                if id(one) in adapted:
                    warnings.warn(
                        f"{adapted[id(one)]!r} lies in a plain {type(held).__name__} of its "
                        f"{type(module).__name__} too, {attribute!r}; where the model calls it through that, its "
                        "adapter does nothing. Then exclude the module with exclude_modules.",
                        IsotuneWarning,
                        stacklevel=2,
                    )


def warn_of_missing(model: nn.Module, config: IsotuneConfig) -> None:
    """Warn of names in target_modules that no module has: PEFT leaves them out where others of the list are found."""
    if isinstance(config.target_modules, str):
        return
    paths = [f".{path}" for path, _ in model.named_modules()]
    for name in sorted(config.target_modules or ()):
        if not any(path.endswith(f".{name}") for path in paths):
            near = get_close_matches(name, {path.rpartition(".")[2] for path in paths}, n=1)
            warnings.warn(
                f"target_modules: no module of the model is called {name!r}, so nothing is adapted for it."
                + (f" Did you mean {near[0]!r}?" if near else ""),
                IsotuneWarning,
                stacklevel=2,
            )


def warn_of_tied(model: nn.Module) -> None:
    """Warn of adapted embeddings whose weight other embeddings look up too, as those of T5 and BART that are called."""
    modules = dict(model.named_modules())
    inner = (".base_layer", ".original_module")
    bare = {n: one for n, one in modules.items() if isinstance(one, nn.Embedding) and not n.endswith(inner)}
    for name, layer in modules.items():
        if not (isinstance(layer, Layer) and isinstance(layer.host.module, nn.Embedding)):
            continue
        weight = layer.base_weight
        # Those that are called lie deeper, in the encoder and the decoder, than the one that lends its weight to them.
        deeper = {other: one for other, one in bare.items() if other.count(".") > name.count(".")}
        others = [other for other, one in deeper.items() if one.weight is weight and one is not layer.host.module]
        if others:
            warnings.warn(
                f"The weight of {name!r} is also that of {', '.join(map(repr, others))}, and the adapter acts only "
                f"where {name!r} itself is called. If the model calls the others in its place, put them into "
                "target_modules instead.",
                IsotuneWarning,
                stacklevel=2,
            )
