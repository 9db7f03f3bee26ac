"""Constant tensors that depend only on sizes, made once per device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T", bound=tuple[Tensor, ...])


def made_once(make: Callable[..., _T]) -> Callable[..., _T]:
    """Cache the result of a function of sizes and, as the last argument, a device, so that it is computed only once.

    Results made while operations are being recorded belong to the recording and are not cached: under torch.compile or
    FakeTensorMode, in torch.jit.trace, which traces twice and compares, and while a CUDA graph is captured, when
    nothing has a value until the graph is replayed.
    """
    kept: dict[tuple[int | torch.device, ...], _T] = {}

    @wraps(make)
    def found(*given: int | torch.device) -> _T:
        recorded = torch.compiler.is_compiling() or type(torch.empty(0, device=given[-1])) is not Tensor
        known = None if recorded else kept.get(given)
        if known is None:
            with torch.inference_mode(False):  # inference tensors could not be saved for backward later
                known = make(*given)
            recorded = recorded or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            if not recorded and not (known[0].is_cuda and torch.cuda.is_current_stream_capturing()):
                kept[given] = known
        return known

    return found
