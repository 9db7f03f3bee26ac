"""The device of the tests in this folder, and what it can do."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import EVERY_METHOD, EXACT_START, HOSTS_OF_12, as_trained, configured, seeded_host, trainable
from isotune import get_peft_model

DEVICE = torch.device(os.environ.get("ISOTUNE_GPU_TESTS", "cuda"))
"""ISOTUNE_GPU_TESTS=cpu tries the tests themselves on a machine without a GPU."""

HOSTS = ("linear", "conv2d", "embedding")
METHOD = pytest.mark.parametrize("method", EVERY_METHOD)
HOST = pytest.mark.parametrize("host", HOSTS)

CUDA_ALONE = pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU has no such thing: needs an NVIDIA GPU")


def why_not_compiled() -> str | None:
    """Why inductor cannot make code for the device here; None where it can."""
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "inductor needs a C compiler, and there is none"
    if DEVICE.type == "cuda" and find_spec("triton") is None:
        return "inductor needs Triton for a GPU, and it is not installed"
    return None


@dataclass(frozen=True)
class Precision:
    """How products are computed."""

    epsilon: float
    """The distance of 1 to the next number of what is multiplied."""
    tf32: bool = False
    autocast: torch.dtype | None = None

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """Compute so within the scope."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = self.tf32
        try:
            with torch.autocast(DEVICE.type, dtype=self.autocast, enabled=self.autocast is not None):
                yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


PRECISIONS = {
    "fp32": Precision(2**-23),
    "tf32": Precision(2**-10, tf32=True),
    "bf16": Precision(2**-7, autocast=torch.bfloat16),
    "fp16": Precision(2**-10, autocast=torch.float16),
    "bf16 and tf32": Precision(2**-7, tf32=True, autocast=torch.bfloat16),
}


def at_start(method: str, host: str) -> tuple[nn.Module, Any, Tensor]:
    """A base on the device, the same with a new adapter, and an input."""
    base = seeded_host(host).to(DEVICE)
    config = configured(method, ["layer"], **EXACT_START.get(method, {}))
    return base, get_peft_model(seeded_host(host).to(DEVICE), config).eval(), HOSTS_OF_12[host][1]().to(DEVICE)


def trained(method: str, host: str, seed: int = 1) -> tuple[Any, Tensor]:
    """An adapted layer on the device with an adapter off the identity, and an input."""
    return as_trained(method, seeded_host(host), "layer", seed=seed).to(DEVICE), HOSTS_OF_12[host][1]().to(DEVICE)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of the trainable parameters, by the loss of a pass."""
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def live_memory() -> int:
    """Bytes that are allocated on the GPU, or the live tensors on a CPU."""
    import gc

    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@contextlib.contextmanager
def waits_refused() -> Iterator[None]:
    """Raise a RuntimeError at what waits for the GPU, as far as torch reports it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
