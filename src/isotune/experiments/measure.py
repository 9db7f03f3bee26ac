"""What a run costs beside its time: bytes kept for backward, and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter import evaluation


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes of distinct storages saved for backward that are not of `model`.

    Tensors may have numbers or, under FakeTensorMode, only shapes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        # By identity, as storages without numbers have no address.
        self._owned = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, Tensor] = {}
        self.nbytes = 0
        self.largest = 0
        """Bytes of the largest storage."""

    def __enter__(self) -> Kept:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        key = id(tensor.untyped_storage())
        if key not in self._owned and key not in self._seen:
            # Alive, or a storage that is freed would give its identity to another, which were then not counted.
            self._seen[key] = tensor
            size = tensor.untyped_storage().nbytes()
            self.nbytes += size
            self.largest = max(self.largest, size)
        return tensor.detach()  # itself, it would be a cycle that no garbage collector sees


@contextlib.contextmanager
def counted_operators() -> Iterator[None]:
    """Let hooks see what the operators' own graph keeps, which is hidden from them elsewhere."""
    hidden = evaluation.hidden_from_hooks
    evaluation.hidden_from_hooks = contextlib.nullcontext
    try:
        yield
    finally:
        evaluation.hidden_from_hooks = hidden


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of distinct storages that `forward` saves for backward; parameters and buffers of `model` not included."""
    with counted_operators(), Kept(model) as kept:
        forward()
    return kept.nbytes


def kept_by_batch(model: Any, batch: Mapping[str, Any], loss: Callable[[Any, Mapping[str, Any]], Tensor]) -> int:
    """Bytes that one training pass of `model` over `batch`, inputs with labels, to its `loss` saves for backward.

    The mode and the random numbers are left as they were.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    training = model.training
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            return kept_bytes(model.train(), lambda: loss(model, inputs))
    finally:
        model.train(training)


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can: on a GPU, and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        # 5 resets the resident set's high-water mark; proc(5), since Linux 4.0.
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """The most memory this process has had: allocated on the GPU where there is one, else resident, in bytes.

    Since `reset_peak_memory`, or else since the process began. None where the system does not tell.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, KeyError):
        # Of this program alone; getrusage also counts what the process was before exec.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def peak_memory_of() -> str:
    """Of what `peak_memory` is the peak: the same for all runs of a machine."""
    return "allocated on the GPU" if torch.cuda.is_available() else "the process's resident memory"
