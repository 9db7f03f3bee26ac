"""Sharing one evaluation among many forward passes, as in a decoding loop or a diffusion sampler."""

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
    """Evaluate the operators once for all forward passes without gradients in a block where parameters do not change.

    The active adapters are evaluated when the block begins. Passes compiled by torch.compile, of whole models or single
    blocks, take the result as an input, and a CUDA graph captured in the block contains no evaluation. Such a graph
    reads the memory of the result, so replay it in the same block. A PeftModel's `generate` is such a block by itself,
    as long as its first pass, over the prompt, is not compiled, which is transformers' default.

    Compiled code does not notice parameters that change within the block after all, nor an adapter that is swapped in
    place; begin another block after that. An adapter that becomes active within the block is evaluated in its first
    uncompiled pass.

    Args:
        model: a PeftModel, or a model with injected adapters, compiled by torch.compile or not.

    Raises:
        ValueError: the model has no isotune adapter.
        BaseMismatchError: an adapter was trained on another base.

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
        raise ValueError(f"This {type(model).__name__} has no isotune adapter to evaluate; give an adapted model.")
    with ExitStack() as calls:
        for module, own in {own: (module, own) for module, own in reversed(found)}.values():
            calls.enter_context(own.calling())
            _evaluate(own, module)
        yield


@torch.no_grad()
def _evaluate(own: AdaptedModel, model: nn.Module) -> None:
    """Evaluate as in a pass in which every layer's input has the dtype of its weight."""
    own.begin(model)
    try:
        for layer in own.layers:
            weight = layer.base_weight
            if not weight.is_floating_point():
                continue  # packed, it does not show the dtype; the first pass evaluates what is not evaluated here
            dtype = torch.promote_types(weight.dtype, torch.float32) if layer.host.folds else working_dtype(weight)
            for adapter in map(layer.adapter, layer.active_here()):
                if adapter.shared is not None:
                    adapter.shared.tensors(adapter, adapter.slot, dtype)
    finally:
        own.end()
