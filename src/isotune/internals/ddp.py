"""Private attributes that DistributedDataParallel reads on the modules it wraps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_OWN = "_isotune_ignored_by_ddp"
_WITHIN_PEFT = "base_model.model."


def ignore_buffers(model: nn.Module, names: Sequence[str]) -> None:
    """Have DistributedDataParallel ignore these buffers of a model, instead of those named in an earlier call.

    It would send all buffers from the first process to the others at every step, but an adapter's never change.

    Args:
        model: the model that is wrapped, itself or as the base model of a PeftModel.
        names: names of its buffers; an empty list undoes it.
    """
    before: set[str] = model.__dict__.pop(_OWN, set())
    ignored = set(model.__dict__.pop(_IGNORED, ())) - before
    own = {prefix + name for name in names for prefix in ("", _WITHIN_PEFT)}
    if own:
        model.__dict__[_OWN] = own
    if ignored | own:
        model.__dict__[_IGNORED] = sorted(ignored | own)
