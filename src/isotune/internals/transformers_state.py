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
    """Let a model loaded from a GGUF file be what it is: its weights are full ones, yet it is marked as quantised.

    Trainer would refuse to train it.

    Args:
        model: loaded from a GGUF file; changed in place and returned.
    """
    for name in ("hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    return model
