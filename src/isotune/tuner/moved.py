"""Adapters whose subspaces have moved: their sizes, which grow in training, in the configuration and when loading."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from isotune.methods.subspace import MovableConfig
from isotune.tuner.layer import Layer
from isotune.tuner.state import KEY_PREFIX, adapted_layers


def update_config(configs: MutableMapping[str, Any], layers: Iterable[Layer], adapter_name: str) -> None:
    """Exchange an adapter's configuration, after tensors were loaded, if it no longer says what is accumulated.

    Args:
        configs: the configurations of a model; that of the adapter is not changed, since others may have it too.
        layers: layers of the model, of which those without the adapter do not count.
        adapter_name: the adapter.
    """
    known, own = configs.get(adapter_name), [layer for layer in layers if adapter_name in layer.isotune_form]
    found = {layer.key: layer.accumulated(adapter_name) for layer in own}
    ranks = {key: len(factors[1]) for key, factors in found.items() if factors is not None}
    if not isinstance(known, MovableConfig) or ranks == known.accumulated_ranks:
        return
    config = configs[adapter_name] = copy.copy(known)
    config.accumulated_ranks = ranks
    config.basis = "embedded" if own[0].bases(adapter_name)[0].embedded else "pinned"
    for layer in own:
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
