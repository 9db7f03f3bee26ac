"""Starting kernels in Triton with little of the host's time, which is what a step of short sequences waits for.

Imported by the modules of kernels only, for Triton is not installed everywhere.
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
"""What Triton has compiled, by all that it compiles anew for: its own look for that takes longer than a launch."""
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_DIRECT = _VERSION >= (3, 3)
"""Whether what is compiled takes the arguments of the kernel as they are."""


def tiles(length: int, size: int) -> int:
    """How many tiles of a size cover a length; Triton's own cdiv takes the host as long as a small launch."""
    return -(-length // size)


def power_of_two(number: int, least: int = 1) -> int:
    """The first power of two from a number and from `least`, itself one, on."""
    return max(least, 1 << (number - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], **options: Any) -> bool:
    """Start a kernel on the device of its first argument; False where Triton cannot, which is said once."""
    global _failed
    device = given[0].device
    key = kernel, device, *options.values(), *map(_kind, given, getattr(kernel, "arg_names", ()))
    known = _compiled.get(key)
    try:
        if known is None or not _DIRECT or device.index != torch.cuda.current_device():
            with torch.cuda.device_of(given[0]):  # type: ignore[no-untyped-call]
                known = kernel[grid](*given, **options)
            if known is not None:  # as from Triton's interpreter
                _compiled[key] = known
        else:
            _start(known, (*grid, 1, 1)[:3], device.index, given)
    except Exception as error:  # no C compiler, a GPU or a driver that this Triton does not know, …
        _failed = True
        warnings.warn(f"Triton cannot run here, plain torch is used instead: {error}", stacklevel=2)
        return False
    return True


def _start(compiled: Any, grid: tuple[int, ...], device: int, given: tuple[Any, ...]) -> None:
    """Start what is compiled on the current stream of a device, the current one."""
    hook = triton.knobs.runtime.launch_enter_hook if _VERSION >= (3, 4) else True
    if getattr(hook, "calls", hook):  # somebody measures, and is to be told
        compiled[grid](*given)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given)


def _kind(argument: Any, name: str) -> Any:
    """What a kernel is compiled for of one argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument < 2**31 if name in ("tokens", "steps") else argument


def work() -> bool:
    """Whether Triton has started all kernels that it was given."""
    return not _failed


def are_rows(like: Tensor, *rows: Tensor) -> bool:
    """Whether kernels read these as (tokens, n): plain tensors of a dtype and device, with neighbours in a row."""
    for tensor in rows:
        plain = type(tensor) is Tensor or type(tensor) is Parameter
        if not plain or tensor.dtype != like.dtype or tensor.device != like.device:
            return False
        if tensor.stride(1) != 1 or tensor.shape[0] == 0:
            return False
    return True
