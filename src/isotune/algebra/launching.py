"""Launching Triton kernels with little host time, for which steps with short sequences wait.

Imported only by the modules of kernels, since Triton is not installed everywhere.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

_failed = False
_compiled: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by everything that Triton specialises on; Triton's own lookup takes longer than a launch."""
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_DIRECT = _VERSION >= (3, 3)
"""Whether a compiled kernel can be called with the kernel's own arguments."""


def tiles(length: int, size: int) -> int:
    """The number of tiles of a size that cover a length; Triton's own cdiv takes as long as a small launch."""
    return -(-length // size)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least a number and at least `least`, itself a power of two."""
    return max(least, 1 << (number - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], **options: Any) -> bool:
    """Launch a kernel on the device of its first argument; if Triton cannot, warn and return False."""
    global _failed
    device = given[0].device
    key = kernel, device, *options.values(), *map(_kind, given, getattr(kernel, "arg_names", ()))
    known = _compiled.get(key)
    try:
        if known is None or not _DIRECT or device.index != torch.cuda.current_device():
            with torch.cuda.device_of(given[0]):  # type: ignore[no-untyped-call]
                known = kernel[grid](*given, **options)
            if known is not None:  # Triton's interpreter returns None
                _compiled[key] = known
        else:
            _start(known, (*grid, 1, 1)[:3], device.index, given)
    except Exception as error:  # no C compiler, a GPU or driver that this Triton does not know, …
        _failed = True
        warnings.warn(f"Triton cannot run here, so plain torch is used instead: {error}", stacklevel=2)
        return False
    return True


def _start(compiled: Any, grid: tuple[int, ...], device: int, given: tuple[Any, ...]) -> None:
    """Launch a compiled kernel on the current stream of this device, which must be the current one."""
    hook = triton.knobs.runtime.launch_enter_hook if _VERSION >= (3, 4) else True
    if getattr(hook, "calls", hook):  # a profiler wants to be notified
        compiled[grid](*given)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given)


def _kind(argument: Any, name: str) -> Any:
    """What a kernel is specialised on for one argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument < 2**31 if name in ("tokens", "steps") else argument


def work() -> bool:
    """Whether Triton has not failed to launch any kernel so far."""
    return not _failed


def are_rows(like: Tensor, *rows: Tensor) -> bool:
    """Whether kernels can read these as (tokens, n): plain tensors of one dtype and device, with contiguous rows."""
    for tensor in rows:
        plain = type(tensor) is Tensor or type(tensor) is Parameter
        if not plain or tensor.dtype != like.dtype or tensor.device != like.device:
            return False
        if tensor.stride(1) != 1 or tensor.shape[0] == 0:
            return False
    return True
