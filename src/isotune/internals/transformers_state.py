"""What transformers writes on its models and their modules."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether transformers has put its tensor parallelism around the forward of a module; there is no public sign."""
    return bool(module.__dict__.get("_is_hooked"))


def attention_of(config: Any) -> str | None:
    """The implementation of attention that a model computes with; public is only how to set it."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def forget_quantisation(model: Any) -> Any:
    """Take the mark of quantisation off a model loaded from GGUF as full weights, which Trainer would not train."""
    quantiser = getattr(model, "hf_quantizer", None)  # transformers 5.6 marks no such model
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    return model
