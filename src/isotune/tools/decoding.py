"""Many forward passes with the same parameters: a decoding loop, the steps of a diffusion sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from isotune.adapter.evaluation import working_dtype
from isotune.internals.torch_state import uncompiled
from isotune.tuner.adapted_model import AdaptedModel


@contextmanager
def evaluated_once(model: nn.Module) -> Iterator[None]:
    """A block in which parameters do not change, so that its passes without gradients evaluate the operators once.

    The active adapters are evaluated when the block begins. Passes that torch.compile has compiled, whole models or
    single blocks, take the result as an input, and a CUDA graph that is captured in the block holds no evaluation. Such
    a graph reads the memory of the result, so it is replayed in the same block. `generate` of a PeftModel is such a
    block by itself as long as its first pass, that of the prompt, is not compiled, as transformers leaves it.

    Compiled code does not see parameters that are changed within the block all the same, or an adapter that is
    exchanged in place; begin another block after that. An adapter that is made active within the block is evaluated by
    its first pass without compilation.

    Args:
        model: a PeftModel, or a model with injected adapters, compiled by torch.compile or not.

    Raises:
        ValueError: the model has no isotune adapter.
        BaseMismatchError: it was trained on another base.

    Examples:
        >>> import torch
        >>> from isotune import OFTConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), OFTConfig(r=2, target_modules=["0"]))
        >>> x = torch.ones(1, 8)
        >>> with torch.no_grad(), evaluated_once(model):
        ...     for _ in range(4):
        ...         x = model(x)
    """
    found = [(module, own) for module in uncompiled(model).modules() if (own := AdaptedModel.of(module)) is not None]
    if not found:
        raise ValueError(f"This {type(model).__name__} has no adapter of isotune's, so there is nothing to evaluate.")
    with ExitStack() as calls:
        for module, own in {own: (module, own) for module, own in reversed(found)}.values():
            calls.enter_context(own.calling())
            _evaluate(own, module)
        yield


@torch.no_grad()
def _evaluate(own: AdaptedModel, model: nn.Module) -> None:
    """Evaluate as in a pass in which every layer has an input of the dtype of its weight."""
    own.begin(model)
    try:
        for layer in own.layers:
            weight = layer.base_weight
            # The packed weight of a quantised layer does not tell; what is not evaluated now, the first pass asks for.
            names = layer.active_here() if weight.is_floating_point() else []
            dtype = torch.promote_types(weight.dtype, torch.float32) if layer.host.folds else working_dtype(weight)
            for adapter in map(layer.adapter, names):
                if adapter.shared is not None:
                    adapter.shared.tensors(adapter, adapter.slot, dtype)
    finally:
        own.end()
