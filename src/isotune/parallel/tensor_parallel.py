"""Tensor parallelism of transformers: a weight of which every process holds some rows or some columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from isotune.internals.transformers_state import is_tensor_parallel
from isotune.parallel.sharding import gathered, is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Share:
    """What one process has of the inputs or outputs of a layer, when their last dimension is split over a mesh.

    Whatever all processes hold whole, they hold alike: `of` and `joined` give gradients that are whole too.
    """

    mesh: DeviceMesh
    """Of the processes, with one dimension."""
    size: int
    """Of the whole dimension."""

    @property
    def span(self) -> slice:
        """The indices of this process: as many as `torch.chunk` would give it."""
        length = -(-self.size // self.mesh.size())
        start = min(self.mesh.get_local_rank() * length, self.size)
        return slice(start, min(start + length, self.size))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of what all processes hold; without a gradient."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def of(self, whole: Tensor) -> Tensor:
        """The part of this process; in backward the gradients of all parts are put together."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        tensor = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return tensor.redistribute(placements=[Shard(whole.ndim - 1)]).to_local()

    def joined(self, part: Tensor) -> Tensor:
        """The whole, from the parts of all processes; in backward each takes the gradient of its own."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.Size([*part.shape[:-1], self.size])
        stride = torch.empty(shape, device="meta").stride()
        placement = [Shard(part.ndim - 1)]
        tensor = DTensor.from_local(part, self.mesh, placement, run_check=False, shape=shape, stride=stride)
        return tensor.redistribute(placements=[Replicate()]).to_local()


@dataclass(frozen=True)
class Division:
    """How tensor parallelism has split a layer of so many inputs and outputs in all."""

    mesh: DeviceMesh
    in_features: int
    out_features: int

    def of_input(self, x: Tensor) -> Share | None:
        """What this process has of the inputs; None for all of them."""
        return None if x.shape[-1] == self.in_features else Share(self.mesh, self.in_features)

    def of_output(self, result: Tensor) -> Share | None:
        """What this process has of the outputs; None for all of them."""
        return None if result.shape[-1] == self.out_features else Share(self.mesh, self.out_features)

    def bias_of(self, result: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's bias for the outputs that `result` has."""
        if bias is None:
            return None
        own: Tensor = bias.to_local()  # type: ignore[attr-defined]
        return own if own.shape[-1] == result.shape[-1] else gathered(bias)


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The processes between which transformers has split the module's own parameters; None if it is whole."""
    if not is_tensor_parallel(module):
        return None
    sharded = (p for p in module.parameters(recurse=False) if is_sharded(p))
    return next((parameter.device_mesh for parameter in sharded), None)  # type: ignore[attr-defined]


def refuse_other_splits(module: nn.Module, name: str, *, packed: bool = False) -> None:
    """Refuse a layer that tensor parallelism has split in a way that no adapter follows.

    Args:
        module: the frozen layer.
        name: its name in the model, for the message.
        packed: whether it is more than one plain matrix: quantised, or experts.
    """
    if not is_tensor_parallel(module):
        return
    from torch.distributed.tensor import Shard

    mesh, weight = mesh_of(module), getattr(module, "weight", None)
    found = "its weight is whole, and what it gives or takes is not"
    if packed or not isinstance(module, (nn.Linear, nn.Embedding)):
        found = f"it is {'quantised or holds experts' if packed else 'no nn.Linear or nn.Embedding'}"
    elif mesh is not None and weight is not None and is_sharded(weight):
        (placement, *others) = weight.placements
        if not others and type(placement) is Shard and weight.shape[placement.dim] >= mesh.size():
            return
        found = f"its weight of shape {tuple(weight.shape)} lies as {weight.placements} on {mesh.size()} processes"
    raise ValueError(
        f"The target module {name!r}, a {type(module).__module__}.{type(module).__qualname__}, is split by tensor "
        f"parallelism in a way that adapters do not follow: {found}. They follow nn.Linear and nn.Embedding, not "
        "quantised, split evenly or unevenly by rows or by columns, without FSDP in addition. Exclude the module "
        "with exclude_modules, or load the model without a tensor parallel plan and spread it with FSDP2."
    )


@torch.no_grad()
def split_like(whole: Tensor, other: Tensor) -> Tensor:
    """This process's part of a tensor, as the tensor-parallel parameter `other` of the same shape is split."""
    from torch.distributed.tensor import DTensor, Replicate

    tensor = DTensor.from_local(whole, other.device_mesh, [Replicate()], run_check=False)  # type: ignore[attr-defined]
    return tensor.redistribute(placements=other.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def make_equal(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give all processes of a mesh the values of its first: they start at random ones, and must stay replicas."""
    source = int(mesh.mesh.flatten()[0])
    for parameter in parameters:
        if not parameter.is_meta:
            dist.broadcast(parameter.data, src=source, group=mesh.get_group())
