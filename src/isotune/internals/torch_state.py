"""State of torch that its public interface does not show."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _python_dispatch, checkpoint


def backward_pass() -> int | None:
    """The id of the backward pass running in this thread, found as torch's own checkpointing does; otherwise None."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def is_rerun_within_its_graph() -> bool:
    """Whether a part of the model runs again to fill the graph of its forward pass, as non-re-entrant checkpointing.

    False too where other hooks of saved tensors lie above those of checkpointing, or torch cannot be asked.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(False)
    name = getattr(hooks[0], "__qualname__", "") if hooks is not None else ""  # a partial has none
    return bool(name.startswith(checkpoint._recomputation_hook.__qualname__))


def version_of(tensor: Tensor) -> int:
    """The number of in-place writes to a tensor; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def is_symbolic(tensor: Tensor) -> bool:
    """Whether a tensor has no values, as on the meta device or under FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def has_own_values(tensor: Tensor) -> bool:
    """Whether a tensor's values are its own and all there is to it, so that they may be compared and kept.

    They are not while torch follows what is computed: in a transform such as vmap or jvp, in forward-mode
    differentiation, under FakeTensorMode and in make_fx.
    """
    followed = sys.modules.get("torch.fx.experimental.proxy_tensor")  # which takes long to import
    if forward_ad._current_level >= 0 or (followed is not None and followed.get_proxy_mode() is not None):
        return False
    return not (isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


transform_level: Callable[[], int | None] = torch._C._functorch.maybe_current_level
"""How deep within transforms of torch.func, such as grad and vmap, the code runs; None outside of them."""


def outside_selective_checkpointing() -> AbstractContextManager[Any]:
    """A scope of which selective checkpointing, where it is on, neither keeps nor looks up what is computed.

    It tells operations apart by their order in a region. What all layers share is computed in the first region of a
    forward pass, and in backward in the region that is rerun first, which is the last.
    """
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    kinds = checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode
    return _python_dispatch._disable_current_modes() if any(isinstance(m, kinds) for m in modes) else nullcontext()


def is_bare(module: torch.nn.Module) -> bool:
    """Whether calling a module runs just its class's own forward: no hooks, no replaced forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def remove_hooks(module: torch.nn.Module, *hooks: Any) -> None:
    """Remove functions from a module's hooks, even in a copy, to which the original's handles do not apply."""
    for table in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks):
        for key in [key for key, hook in table.items() if hook in hooks]:
            del table[key]
            module._forward_hooks_always_called.pop(key, None)


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module wrapped by torch.compile, or the module itself; the wrapper has no public attribute for it."""
    inner: torch.nn.Module = getattr(model, "_orig_mod", model)
    return inner


def common_store() -> Any:
    """The key-value store through which the default group's processes met; public functions only create new ones."""
    return torch.distributed.distributed_c10d._get_default_store()


GROUPED_PRODUCT: Any = getattr(torch.ops.aten, "_grouped_mm", None)
"""The operation that computes the experts of a mixture; None in torch 2.6, which lacks it."""
