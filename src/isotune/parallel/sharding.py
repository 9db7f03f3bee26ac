"""Weights that are spread over processes: sharded by FSDP, partitioned by DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist

from isotune.internals.deepspeed_state import full_shape, gather_with, gathering, is_gathered, is_partitioned

__all__ = ["gather_with", "is_partitioned"]  # for those who import them from here


def in_group() -> bool:
    """Whether this process works in a group, possibly of itself alone."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes (there may be one only), by FSDP2 or by ZeRO-3."""
    if is_partitioned(tensor) or not in_group():
        return is_partitioned(tensor)
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_wrapped_by_fsdp(model: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 gathers parameters around parts of a model, so that not all of them are there at once."""
    if not in_group():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def is_whole(tensor: Tensor) -> bool:
    """Whether all elements of the tensor are here now."""
    return is_gathered(tensor) if is_partitioned(tensor) else not is_sharded(tensor)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the tensor with all its elements."""
    return full_shape(tensor) if is_partitioned(tensor) else tensor.shape


def gathered(tensor: Tensor) -> Tensor:
    """The tensor with all its elements, for which every process that has a part must ask; without a graph in ZeRO-3."""
    if is_whole(tensor):
        return tensor
    if is_partitioned(tensor):
        with whole([tensor]):
            return tensor.data  # what the parameter loses at the end of the block, this keeps
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A block in which those parameters that ZeRO-3 has partitioned are here; every process must enter it."""
    absent = [parameter for parameter in parameters if is_partitioned(parameter) and not is_whole(parameter)]
    with gathering(absent) if absent else nullcontext():
        yield
