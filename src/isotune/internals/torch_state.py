"""What torch knows and says nowhere in its public interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def backward_pass() -> int | None:
    """Identify the backward pass that is running in this thread, as torch's own checkpointing does; else None."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def version_of(tensor: Tensor) -> int:
    """Count how often a tensor was written to in place; tensors of inference mode do not count and give 0."""
    return 0 if tensor.is_inference() else tensor._version


def is_symbolic(tensor: Tensor) -> bool:
    """Say whether a tensor has no values to compute with, as on the meta device or under FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def is_bare(module: torch.nn.Module) -> bool:
    """Say whether calling a module runs its class's own forward and nothing else: no hooks, no replaced forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def remove_hooks(module: torch.nn.Module, *hooks: Any) -> None:
    """Take functions off the hooks of a module: a copy of it has the functions, and other handles than the original."""
    for table in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks):
        for key in [key for key, hook in table.items() if hook in hooks]:
            del table[key]
            module._forward_hooks_always_called.pop(key, None)


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module that torch.compile has wrapped, or the module itself; the wrapper has no public attribute for it."""
    inner: torch.nn.Module = getattr(model, "_orig_mod", model)
    return inner


def common_store() -> Any:
    """The key-value store by which the processes of the default group found each other; public ones are made anew."""
    return torch.distributed.distributed_c10d._get_default_store()


GROUPED_PRODUCT: Any = getattr(torch.ops.aten, "_grouped_mm", None)
"""The operation that the experts of a mixture are computed with; None in torch 2.6, which does not have it."""
