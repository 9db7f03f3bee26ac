"""Tensors of indices that depend on sizes alone, made once for each device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T", bound=tuple[Tensor, ...])


def made_once(make: Callable[..., _T]) -> Callable[..., _T]:
    """Keep what a function of sizes and, last, a device gives, so that no pass spends kernels on it again.

    What is made while operations are recorded belongs to the record, and is not kept: by torch.compile, under
    FakeTensorMode, and in the capture of a CUDA graph, where no number exists before the graph is replayed.
    """
    kept: dict[tuple[int | torch.device, ...], _T] = {}

    @wraps(make)
    def found(*given: int | torch.device) -> _T:
        recorded = torch.compiler.is_compiling() or type(torch.empty(0, device=given[-1])) is not Tensor
        known = None if recorded else kept.get(given)
        if known is None:
            with torch.inference_mode(False):  # a tensor of inference mode could not be saved for backward later
                known = make(*given)
            if not recorded and not (known[0].is_cuda and torch.cuda.is_current_stream_capturing()):
                kept[given] = known
        return known

    return found
