"""Weights that are spread over processes: sharded by FSDP, partitioned by DeepSpeed ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist

from isotune.internals.deepspeed_state import full_shape, gather_with, gathering, is_gathered, is_partitioned

__all__ = ["gather_with", "is_partitioned"]  # re-exported


def in_group() -> bool:
    """Whether this process belongs to a process group, possibly as its only member."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is sharded by FSDP2 or partitioned by ZeRO-3, even over a single process."""
    if is_partitioned(tensor):
        return True
    if not in_group():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_wrapped_by_fsdp(model: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 gathers the parameters of a model part by part, so that not all are here at once."""
    if not in_group():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def is_whole(tensor: Tensor) -> bool:
    """Whether all elements of the tensor are here now."""
    return is_gathered(tensor) if is_partitioned(tensor) else not is_sharded(tensor)


def shape_of(tensor: Tensor) -> torch.Size:
    """The full shape of the tensor."""
    return full_shape(tensor) if is_partitioned(tensor) else tensor.shape


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; every process that holds a part must call this. Without a graph under ZeRO-3."""
    if is_whole(tensor):
        return tensor
    if is_partitioned(tensor):
        with whole([tensor]):
            return tensor.data  # stays valid when the parameter is emptied at the end of the block
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within this block, gather the parameters that ZeRO-3 has partitioned; every process must enter it."""
    absent = [parameter for parameter in parameters if is_partitioned(parameter) and not is_whole(parameter)]
    with gathering(absent) if absent else nullcontext():
        yield
