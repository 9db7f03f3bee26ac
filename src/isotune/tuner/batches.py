"""What it takes to run a model on a user's batches and gather something as large as the weights of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from isotune.tuner.layer import Layer


def groups_that_fit(layers: Iterable[Layer], memory: int, size: Callable[[Layer], int]) -> Iterator[list[Layer]]:
    """Neighbouring layers for which there is memory together, one at least.

    Args:
        layers: the layers.
        memory: bytes.
        size: the bytes that one layer takes.
    """
    group: list[Layer] = []
    room = memory
    for layer in layers:
        own = size(layer)
        if group and own > room:
            yield group
            group, room = [], memory
        group.append(layer)
        room -= own
    if group:
        yield group


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this block, a model is in evaluation mode; each of its modules then is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device: a tensor, or mappings of tensors; anything else stays as it is."""
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
