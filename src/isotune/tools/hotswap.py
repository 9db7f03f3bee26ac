"""Exchange a running adapter for another of the same shapes, in the very tensors that the model computes with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from isotune.adapter.placement import Placement
from isotune.adapter.subspace import SubspaceAdapter
from isotune.errors import AdapterFileError
from isotune.files.adapter import (
    ADAPTER,
    AdapterFile,
    describe,
)
from isotune.internals.torch_state import uncompiled
from isotune.methods.config import IsotuneConfig, config_fields
from isotune.tuner.layer import Layer
from isotune.tuner.placing import place_adapter
from isotune.tuner.state import KEY_PREFIX, adapted_layers, check_tensors, named_tensors

_WHERE_AND_HOW = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version",
    "init_weights", "basis_seed",
}  # fmt: skip
"""Fields that two adapters of the same function may differ in."""


_FORM = "isotune_form."


@dataclass
class _Incoming:
    """All that a swap writes, computed before the first tensor is touched."""

    copies: list[tuple[Tensor, Tensor]]
    """(what the model holds, what comes)."""
    placements: list[tuple[SubspaceAdapter, Placement]]
    """(adapter, its new placement), only where the basis is another; in the old tensors if nobody shares them."""


def hotswap_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    lock: AbstractContextManager[Any] | None = None,
) -> None:
    """Replace an adapter by that of a folder without new modules or tensors, so that a compiled model stays compiled.

    Everything that can fail or takes long (reading, checking, finding the subspaces on this base, which the same pin
    spares) is done on the side; then the numbers are copied in place, under `lock` if one is given. Until then other
    threads may go on calling the model. A forward pass that overlaps the copying could see a part of each adapter, so a
    server holds the same lock around each batch, or swaps between two of them. A swap that is refused changes nothing.

    Args:
        model: a PeftModel or a model with injected adapters, compiled by torch.compile or not.
        directory: the folder that save_pretrained wrote, of the same method, modules, shapes and options.
        adapter_name: which adapter of the model is replaced; it keeps this name, and what is active stays so.
        lock: entered for the copying alone.

    Raises:
        ValueError: there is no such adapter, it is merged, or the file's cannot be swapped in; says why.
        AdapterFileError: the file is damaged or incomplete.
        BaseMismatchError: it was trained on another base.

    Example:
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
    inner = uncompiled(model)
    configs: dict[str, Any] = getattr(inner, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, IsotuneConfig):
        have = ", ".join(map(repr, configs)) or "none"
        raise ValueError(f"There is no isotune adapter {adapter_name!r} to be replaced; this model has {have}.")
    layers = dict(adapted_layers(inner, adapter_name))
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"Adapters are merged into {merged[0]!r}; call unmerge_adapter() before a swap.")
    file = describe(directory)
    for name in config.runtime_fields:
        setattr(file.config, name, getattr(config, name))
    _check_options(file, config, layers, adapter_name)
    incoming = _prepare(inner, file, layers, adapter_name)
    file.config.inference_mode = config.inference_mode
    in_inference = any(held.is_inference() for held, _ in incoming.copies)
    with lock or nullcontext(), torch.inference_mode() if in_inference else torch.no_grad():
        for held, new in incoming.copies:
            held.copy_(new)
        for adapter, placement in incoming.placements:
            adapter.placement = placement
        for layer in layers.values():
            layer.configs[adapter_name] = file.config
        configs[adapter_name] = file.config


def _check_options(file: AdapterFile, config: IsotuneConfig, layers: Mapping[str, Layer], adapter_name: str) -> None:
    """Refuse a file whose adapter is not computed by the very same operations."""
    if type(file.config) is not type(config):
        raise ValueError(
            f"{file.directory} holds an adapter of type {file.config.peft_type}, and {adapter_name!r} is of type "
            f"{config.peft_type}. Load it beside with isotune.load_adapter and switch with set_adapter."
        )
    missing, more = sorted(layers.keys() - file.layers.keys()), sorted(file.layers.keys() - layers.keys())
    if missing or more:
        raise ValueError(
            f"{file.directory} adapts other modules than {adapter_name!r}: without {missing[:3] or 'none'}, and "
            f"{more[:3] or 'none'} besides. Only an adapter of the same modules can be swapped in; load it beside with "
            "isotune.load_adapter and switch with set_adapter."
        )
    check_tensors(
        {f"{n}.{k}": t for n, layer in layers.items() for k, t in named_tensors(layer, adapter_name).items()},
        {f"{n}.{k}": t for n, own in file.layers.items() for k, t in own.items()},
        f"for the adapter {adapter_name!r} of this model; only one of the same shapes can be swapped in",
    )
    for name, layer in layers.items():
        new, old = file.operator(name), layer.adapter(adapter_name)
        if (new.batch_key(), new.form_key) != (old.batch_key(), old.form_key):
            different = [
                f"{field}={getattr(file.config, field)!r} and not {getattr(config, field)!r}"
                for field in config_fields(type(config))
                if field not in _WHERE_AND_HOW and getattr(file.config, field) != getattr(config, field)
            ]
            raise ValueError(
                f"{file.directory} was trained with other options than {adapter_name!r} ("
                f"{', '.join(different) or 'another scale of ' + repr(name)}), so the model would compute differently. "
                "Load it beside with isotune.load_adapter and switch with set_adapter."
            )


def _prepare(model: nn.Module, file: AdapterFile, layers: Mapping[str, Layer], adapter_name: str) -> _Incoming:
    """Find the bases that are new on this model's weights, and all tensors with what comes into them."""
    beside: dict[str, Layer] = {}
    for name, layer in layers.items():
        held = named_tensors(layer, adapter_name)
        stored = {key: t for key, t in file.layers[name].items() if key.startswith(_FORM)}
        if not all(torch.equal(t, held[key].cpu()) for key, t in stored.items()):
            beside[name] = file.build(name, layer.without_adapters())
    place_adapter(ADAPTER, beside.values())
    users = Counter(
        id(placement.down)
        for module in model.modules()
        if (placement := getattr(module, "placement", None)) is not None
    )
    copies: list[tuple[Tensor, Tensor]] = []
    placements = []
    for name, other in beside.items():
        adapter = layers[name].subspace(adapter_name)
        old, placement = adapter.placement, other.subspace(ADAPTER).placement
        assert placement is not None
        bases = [basis.stored for basis in layers[name].bases(adapter_name)]
        copies += zip(bases, placement.stored, strict=True)
        if old is not None and users[id(old.down)] == 1:
            copies += [(old.down, placement.down), (old.up, placement.up)]
            placement = replace(placement, down=old.down, up=old.up)
        placements.append((adapter, placement))
    for name, layer in layers.items():
        held = named_tensors(layer, adapter_name)
        copies += [(held[key], t) for key, t in file.layers[name].items() if not key.startswith(_FORM)]
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    extras = {key.removeprefix(KEY_PREFIX): t for key, t in state.items() if ".isotune_" not in key}
    given = {key.removeprefix(KEY_PREFIX): t for key, t in file.extras.items()}
    more = sorted(given.keys() - extras.keys())
    if more:
        raise AdapterFileError(f"{file.directory} holds {more[0]!r}, which {adapter_name!r} has not; load it beside.")
    check_tensors(extras, given, f"for the adapter {adapter_name!r} of this model")
    return _Incoming([*copies, *((extras[key], tensor) for key, tensor in given.items())], placements)
