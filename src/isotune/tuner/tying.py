"""Weights that layers share, such as an embedding and the head, while adapters are on one of them or merged into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from isotune.tuner.adapted_model import AdaptedModel, stand_ins
from isotune.tuner.layer import Layer


@contextmanager
def base_layers_in_place(model: nn.Module) -> Iterator[None]:
    """While the block runs, the base's own layers, with nothing merged, are in place of adapted and saved ones.

    transformers takes a weight to share from the layer that has it, where the base's own is meant: not one with
    adapters in it, which is no parameter, nor one that they are merged into, which unmerging takes away again.
    """
    with ExitStack() as stack:
        for owner, name, module, original in stand_ins(model):
            if isinstance(module, Layer):
                stack.enter_context(module.unmerged())
            stack.callback(setattr, owner, name, module)
            setattr(owner, name, original)
        yield


@contextmanager
def kept_tied(model: nn.Module) -> Iterator[None]:
    """Give what was tied to a merged weight the base's own, where the block unmerges."""
    own = AdaptedModel.ready(model)
    merged = [(layer.host.weight, layer) for layer in ([] if own is None else own.layers) if layer.merged]
    layers = {id(weight): layer for weight, layer in merged}  # which are kept here, or others could get their ids
    yield
    for module in model.modules() if merged else ():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in layers:
                setattr(module, name, layers[id(parameter)].base_weight)
