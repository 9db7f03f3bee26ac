"""Swapping a running adapter for another of the same shapes, in the tensors that the model already uses."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from isotune.adapter.placement import Placement
from isotune.adapter.update import PlacedUpdate
from isotune.errors import AdapterFileError
from isotune.files.adapter import ADAPTER, AdapterFile, config_of, describe
from isotune.internals.torch_state import uncompiled
from isotune.methods.checks import shown
from isotune.methods.config import IsotuneConfig, config_fields
from isotune.tuner.layer import Layer
from isotune.tuner.placing import place_adapter
from isotune.tuner.state import KEY_PREFIX, adapted_layers, check_tensors

_WHERE = {
    *(field.name for field in fields(IsotuneConfig)),
    "rank_pattern",
    "alpha_pattern",
    "basis_seed",
    "accumulated_ranks",
}
"""Fields that may differ between two adapters that are computed alike."""

_FORM = "isotune_form."
_BESIDE = "Load it as another adapter with isotune.load_adapter and switch with set_adapter."


def hotswap_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    lock: AbstractContextManager[Any] | None = None,
) -> None:
    """Replace an adapter by one from a folder without new modules or tensors, so that a compiled model stays compiled.

    Everything that can fail or take long happens beforehand: reading, checking, and finding the subspaces on this base
    (not needed if the pin is the same). Then the values are copied in place, under `lock` if one is given; until then
    other threads may call the model. A forward pass during the copying could see parts of both adapters, so a server
    should hold the same lock around each batch, or swap between batches. A refused swap changes nothing.

    Args:
        model: a PeftModel or a model with injected adapters, compiled by torch.compile or not.
        directory: a folder written by save_pretrained, with the same method, modules, shapes and options.
        adapter_name: the adapter of the model to replace; its name and the active adapters stay the same.
        lock: a context manager entered only for the copying.

    Raises:
        ValueError: there is no such adapter, it is merged, or the adapter in the folder cannot be swapped in; says why.
        AdapterFileError: the file is damaged or incomplete.
        BaseMismatchError: the new adapter was trained on another base.

    Examples:
        >>> import tempfile
        >>> from isotune import OFTConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), OFTConfig(r=2, target_modules=["0"]))
        >>> x = torch.ones(1, 8)
        >>> with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ...     model.save_pretrained(folder)
        ...     before = model(x)
        ...     _ = [p.add_(0.1) for p in model.parameters() if p.requires_grad]
        ...     changed = not torch.equal(model(x), before)
        ...     hotswap_adapter(model, folder)
        >>> changed, torch.equal(model(x), before)
        (True, True)
    """
    inner: Any = uncompiled(model)
    config = config_of(inner, adapter_name)
    layers = dict(adapted_layers(inner, adapter_name))
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"Adapters are merged into {merged[0]!r}; call unmerge_adapter() before a swap.")
    file = describe(directory)
    for name in config.runtime_fields:
        setattr(file.config, name, getattr(config, name))
    state = get_peft_model_state_dict(inner, adapter_name=adapter_name)
    held = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in state.items()}
    given = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in file.extras.items()}
    given |= {f"{name}.{key}": tensor for name, own in file.layers.items() for key, tensor in own.items()}
    _check(file, config, layers, held, given, adapter_name)
    copies = [(held[key], tensor) for key, tensor in given.items() if f".{_FORM}" not in key]
    placements = _place_beside(inner, file, layers, adapter_name, copies)
    file.config.inference_mode = config.inference_mode
    in_inference = any(old.is_inference() for old, _ in copies)
    with lock or nullcontext(), torch.inference_mode() if in_inference else torch.no_grad():
        for old, new in copies:
            old.copy_(new)
        for adapter, placement in placements:
            adapter.placement = placement
        for layer in layers.values():
            layer.refresh()
            layer.configs[adapter_name] = file.config
        inner.peft_config[adapter_name] = file.config


def _check(
    file: AdapterFile,
    config: IsotuneConfig,
    layers: Mapping[str, Layer],
    held: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    adapter_name: str,
) -> None:
    """Refuse a file whose adapter has other tensors or is computed by other operations."""
    if type(file.config) is not type(config):
        raise ValueError(
            f"{file.directory} holds an adapter of type {file.config.peft_type}, but {adapter_name!r} is of type "
            f"{config.peft_type}. {_BESIDE}"
        )
    missing, more = sorted(layers.keys() - file.layers.keys()), sorted(file.layers.keys() - layers.keys())
    if missing or more:
        raise ValueError(
            f"{file.directory} adapts other modules than {adapter_name!r}: it lacks {missing[:3] or 'none'} and adds "
            f"{more[:3] or 'none'}, and only one of the same modules can be swapped in. {_BESIDE}"
        )
    others = sorted(key for key in given.keys() - held.keys() if ".isotune_" not in key)
    if others:
        raise AdapterFileError(f"{file.directory} holds {others[0]!r}, which {adapter_name!r} does not have. {_BESIDE}")
    ranks = [getattr(one, "accumulated_ranks", {}) for one in (file.config, config)]
    if ranks[0] != ranks[1]:
        raise ValueError(
            f"{file.directory} has accumulated updates of other ranks than {adapter_name!r}, as subspaces have moved "
            f"({shown(ranks[0])} instead of {shown(ranks[1])}), and they do not fit the same tensors. {_BESIDE}"
        )
    truncations = [getattr(one, "base_rank_pattern", {}) for one in (file.config, config)]
    if truncations[0] != truncations[1]:
        raise ValueError(
            f"{file.directory} is for a base that is truncated otherwise than for {adapter_name!r} "
            f"(base_rank_pattern={shown(truncations[0])} instead of {shown(truncations[1])}). Load it on the base "
            "model, loaded once more."
        )
    where = f"for the adapter {adapter_name!r} of this model; only one of the same shapes can be swapped in"
    check_tensors(held, given, where)
    for name, layer in layers.items():
        new, old = file.operator(name), layer.adapter(adapter_name)
        if (new.batch_key(), new.form_key) != (old.batch_key(), old.form_key):
            different = [
                f"{option}={getattr(file.config, option)!r} instead of {getattr(config, option)!r}"
                for option in config_fields(type(config))
                if option not in _WHERE and getattr(file.config, option) != getattr(config, option)
            ]
            raise ValueError(
                f"{file.directory} was trained with other options than {adapter_name!r} ("
                f"{', '.join(different) or 'another scale of ' + repr(name)}), so the model would compute differently. "
                f"{_BESIDE}"
            )


def _place_beside(
    model: nn.Module,
    file: AdapterFile,
    layers: Mapping[str, Layer],
    adapter_name: str,
    copies: list[tuple[Tensor, Tensor]],
) -> list[tuple[PlacedUpdate, Placement]]:
    """Place the new bases on this model's weights, and add to `copies` what is to be copied into the old tensors."""
    beside: dict[str, Layer] = {}
    for name, layer in layers.items():
        held = layer.isotune_form[adapter_name].state_dict() if adapter_name in layer.isotune_form else {}
        if not all(torch.equal(file.layers[name][_FORM + key], tensor.cpu()) for key, tensor in held.items()):
            beside[name] = file.build(name, layer.without_adapters())
    place_adapter(ADAPTER, beside.values())
    users = Counter(
        id(placement.down)
        for module in model.modules()
        if (placement := getattr(module, "placement", None)) is not None
    )
    placements = []
    for name, other in beside.items():
        adapter = layers[name].subspace(adapter_name)
        old, placement = adapter.placement, other.subspace(ADAPTER).placement
        assert placement is not None
        copies += zip(
            layers[name].isotune_form[adapter_name].buffers(), other.isotune_form[ADAPTER].buffers(), strict=True
        )
        # Factors of a layer that stands in for the base's may be that layer's own, which are never written to.
        if old is not None and users[id(old.down)] == 1 and not layers[name].host.stands_in:
            copies += [(old.down, placement.down), (old.up, placement.up)]
            placement = replace(placement, down=old.down, up=old.up)
        placements.append((adapter, placement))
    return placements
