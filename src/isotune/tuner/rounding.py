"""Warning about trainable factors that start at 1 in a dtype too coarse for an optimiser's steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from isotune.errors import IsotuneWarning
from isotune.internals.deepspeed_state import takes_gradients


def warn_of_rounded(adapters: Iterable[Any]) -> bool:
    """Warn that trainable factors in half precision may never move, and return whether a warning was given.

    There is no warning if ZeRO trains its own float32 copies, nor in any run of several processes, since under FSDP a
    forward pass does not see the parameters that are trained.

    Args:
        adapters: adapters of a model about to be trained.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    for adapter in adapters:
        names = tuple(name for name in adapter.near_one if _is_rounded(getattr(adapter, name)))
        if not names or takes_gradients(adapter):
            continue
        dtype, verb = getattr(adapter, names[0]).dtype, "is" if len(names) == 1 else "are"
        warnings.warn(
            f"{' and '.join(names)} of an adapter ({type(adapter).__name__}, {adapter.describe()}) {verb} trained in "
            f"{str(dtype).removeprefix('torch.')}, and start at 1, where an optimiser's step of less "
            f"than {torch.finfo(dtype).eps / 4:.1g} is rounded away, so they may never move. Cast what is trained to "
            "float32 before the first step: for p in model.parameters(): if p.requires_grad: p.data = p.data.float()",
            IsotuneWarning,
            stacklevel=2,
        )
        return True
    return False


def _is_rounded(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
