"""transformers' tensor parallelism, in which every process holds some rows or columns of a weight."""

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
    """One process's share of the inputs or outputs of a layer, whose last dimension may be split over a mesh.

    Tensors that all processes hold whole are equal in all of them: `of` and `joined` keep their gradients whole too.
    """

    mesh: DeviceMesh | None
    """The one-dimensional mesh of the processes; None if this process has the whole dimension."""
    size: int
    """Size of the whole dimension."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, without a gradient."""
        if self.mesh is None:
            return tensor
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def cut(self, whole: Tensor, dim: int = -1) -> Tensor:
        """This process's part of a frozen tensor along a dimension, divided as by `torch.chunk`: a view."""
        if self.mesh is None:
            return whole
        length = -(-self.size // self.mesh.size())
        start = min(self.mesh.get_local_rank() * length, self.size)
        return whole.narrow(dim, start, min(length, self.size - start))

    def of(self, whole: Tensor, dim: int = -1) -> Tensor:
        """This process's part of a whole tensor along a dimension; backward joins the gradients of all parts."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import DTensor, Replicate, Shard

        tensor = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return tensor.redistribute(placements=[Shard(dim % whole.ndim)]).to_local()

    def joined(self, part: Tensor) -> Tensor:
        """The whole tensor from the parts of all processes; in backward each takes the gradient of its own part."""
        if self.mesh is None:
            return part
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.Size([*part.shape[:-1], self.size])
        stride = torch.empty(shape, device="meta").stride()
        placement = [Shard(part.ndim - 1)]
        tensor = DTensor.from_local(part, self.mesh, placement, run_check=False, shape=shape, stride=stride)
        return tensor.redistribute(placements=[Replicate()]).to_local()


WHOLE = Share(None, 0)
"""The share of a process that has everything."""
Shares = tuple[Share, Share]
"""One process's shares of the inputs and outputs of a layer."""
UNSPLIT: Shares = (WHOLE, WHOLE)


@dataclass(frozen=True)
class Division:
    """How tensor parallelism splits a layer with this total number of inputs and outputs, if it does."""

    mesh: DeviceMesh | None
    in_features: int
    out_features: int

    def of_input(self, x: Tensor) -> Share:
        """This process's share of the inputs."""
        return WHOLE if x.shape[-1] == self.in_features else Share(self.mesh, self.in_features)

    def of_output(self, result: Tensor) -> Share:
        """This process's share of the outputs."""
        return WHOLE if result.shape[-1] == self.out_features else Share(self.mesh, self.out_features)

    def bias_of(self, result: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's bias for the outputs in `result`."""
        if bias is None or self.mesh is None:
            return bias
        own: Tensor = bias.to_local()  # type: ignore[attr-defined]
        return own if own.shape[-1] == result.shape[-1] else gathered(bias)


UNDIVIDED = Division(None, 0, 0)
"""Of a layer that each process has whole."""


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The processes among which transformers has split the module's own parameters; None if they are whole."""
    if not is_tensor_parallel(module):
        return None
    sharded = (p for p in module.parameters(recurse=False) if is_sharded(p))
    return next((parameter.device_mesh for parameter in sharded), None)  # type: ignore[attr-defined]


def refuse_other_splits(module: nn.Module, name: str, *, packed: bool = False) -> None:
    """Refuse a layer that tensor parallelism has split in a way that adapters do not support.

    Args:
        module: the frozen layer.
        name: its name in the model, for the message.
        packed: whether it is not a single plain matrix: quantised, or experts.
    """
    if not is_tensor_parallel(module):
        return
    from torch.distributed.tensor import Shard

    mesh, weight = mesh_of(module), getattr(module, "weight", None)
    found = "its weight is whole, but its inputs or outputs are not"
    if packed or not isinstance(module, (nn.Linear, nn.Embedding)):
        found = f"it is {'quantised or holds experts' if packed else 'not an nn.Linear or nn.Embedding'}"
    elif mesh is not None and weight is not None and is_sharded(weight):
        (placement, *others) = weight.placements
        if not others and type(placement) is Shard and weight.shape[placement.dim] >= mesh.size():
            return
        found = f"its weight of shape {tuple(weight.shape)} is placed as {weight.placements} on {mesh.size()} processes"
    raise ValueError(
        f"The target module {name!r}, a {type(module).__module__}.{type(module).__qualname__}, is split by tensor "
        f"parallelism in a way that adapters do not support: {found}. They support unquantised nn.Linear and "
        "nn.Embedding, split evenly or unevenly by rows or by columns, without FSDP in addition. Exclude the module "
        "with exclude_modules, or load the model without a tensor parallel plan and shard it with FSDP2."
    )


@torch.no_grad()
def split_like(whole: Tensor, other: Tensor) -> Tensor:
    """This process's part of a tensor, split like the tensor-parallel parameter `other` of the same shape."""
    from torch.distributed.tensor import DTensor, Replicate

    tensor = DTensor.from_local(whole, other.device_mesh, [Replicate()], run_check=False)  # type: ignore[attr-defined]
    return tensor.redistribute(placements=other.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def make_equal(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give all processes of a mesh the first one's values, since they start at random and must be replicas."""
    source = int(mesh.mesh.flatten()[0])
    for parameter in parameters:
        if not parameter.is_meta:
            dist.broadcast(parameter.data, src=source, group=mesh.get_group())
