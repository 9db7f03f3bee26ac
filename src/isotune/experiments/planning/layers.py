"""What isotune's layers hold and keep, by formula: the one place where plans look into adapters."""

from __future__ import annotations

from torch import nn

from isotune.adapter.subspace import SubspaceAdapter
from isotune.hosts import ExpertsHost
from isotune.tuner.layer import Layer


def factor_bytes(model: nn.Module) -> int:
    """Down, up and pin of every subspace; tensors that adapters share count once."""
    tensors = {id(b): b for layer in _layers(model) for form in layer.isotune_form.values() for b in form.buffers()}
    placements = (module.placement for module in model.modules() if isinstance(module, SubspaceAdapter))
    factors = {id(t): t for placement in placements if placement is not None for t in placement.factors}
    return sum(t.nbytes for t in {**tensors, **factors}.values())


def _layers(model: nn.Module) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer)]


def adapter_activations(model: nn.Module, tokens: int) -> int:
    """Bytes that isotune's adapters keep for backward beyond the frozen model, by formula.

    tokens × r for an update of a subspace, in the dtype of the base; at most tokens × in for a rotation of all inputs,
    which layers that read the same input share. The operators themselves come on top, whatever the tokens, and so does
    what convolutions and embeddings fold. Experts keep a folded copy of their parameter.
    """
    total = 0
    for layer in _layers(model):
        if layer.host.folds:
            total += layer.host.weight.nbytes if isinstance(layer.host, ExpertsHost) else 0
            continue
        total += sum(tokens * layer.adapter(name).size for name in layer.configs) * layer.host.weight.element_size()
    return total
