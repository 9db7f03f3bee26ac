"""Private attributes that transformers sets on its models and their modules."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether transformers has wrapped a module's forward for tensor parallelism; there is no public query."""
    return bool(module.__dict__.get("_is_hooked"))


def attention_of(config: Any) -> str | None:
    """The attention implementation that a model uses; publicly it can only be set."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def forget_quantisation(model: Any) -> Any:
    """Remove the mark of quantisation from a model loaded from GGUF in full precision, which Trainer would refuse."""
    quantiser = getattr(model, "hf_quantizer", None)  # transformers 5.6 marks no such model
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    return model


def scales_by_tie(model: Any) -> bool:
    """Whether a model's forward asks whether its embeddings are tied, as UMT5's does, which then scales its logits."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names
