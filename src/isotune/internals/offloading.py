"""Private attributes by which accelerate and diffusers move weights in and out around a module's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's tensors elsewhere between its calls."""
    hook: Any = module.__dict__.get("_hf_hook")
    return hook is not None and any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def is_managed(module: nn.Module) -> bool:
    """Whether accelerate or diffusers moves, casts or removes a module's tensors around its forward."""
    return "_diffusers_hook" in module.__dict__ or is_offloaded(module)


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Within this block, have a module's own parameters here, even if accelerate keeps them elsewhere between calls."""
    hook: Any = module.__dict__.get("_hf_hook")
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
