"""Adapters whose subspaces have moved: their sizes, which grow in training, in the configuration and when loading."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from isotune.methods.subspace import MovableConfig
from isotune.tuner.layer import Layer
from isotune.tuner.state import KEY_PREFIX, adapted_layers


def moved_config(config: MovableConfig, layers: Iterable[Layer], adapter_name: str) -> MovableConfig:
    """The configuration that says what the layers of an adapter have accumulated; the same one if it does already.

    Args:
        config: the adapter's configuration, which is not changed, since other adapters may have it too.
        layers: layers of a model, of which those without the adapter do not count.
        adapter_name: the adapter.
    """
    own = {layer.key: layer.bases(adapter_name)[0] for layer in layers if adapter_name in layer.isotune_form}
    ranks = {key: len(basis.accumulated[1]) for key, basis in own.items() if basis.accumulated is not None}
    if ranks == config.accumulated_ranks:
        return config
    config = copy.copy(config)
    config.accumulated_ranks = ranks
    config.basis = "embedded" if next(iter(own.values())).embedded else "pinned"
    return config


def update_config(configs: MutableMapping[str, Any], layers: Iterable[Layer], adapter_name: str) -> None:
    """Exchange an adapter's configuration, after tensors were loaded, if it no longer says what is accumulated."""
    known, layers = configs.get(adapter_name), list(layers)
    if not isinstance(known, MovableConfig):
        return
    config = moved_config(known, layers, adapter_name)
    if config is not known:
        configs[adapter_name] = config
        for layer in layers:
            if adapter_name in layer.configs:
                layer.configs[adapter_name] = config


def make_room(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Before a checkpoint is loaded into an adapter in use, give its bases the sizes of the checkpoint's.

    Args:
        model: the model.
        adapter_name: the adapter.
        state: the tensors of the file by name.
    """
    given = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in state.items()}
    for name, layer in adapted_layers(model, adapter_name):
        for basis in layer.bases(adapter_name):
            names = {key: f"{name}.isotune_form.{key}" for key in basis.held()}
            basis.fit({key: given[full] for key, full in names.items() if full in given})
