"""Several processes: one finds what all need, weights that are spread over them are gathered, replicas stay equal."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

WAIT = timedelta(seconds=60)
"""How long processes wait for each other before each computes for itself."""

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_WITHIN_PEFT = "base_model.model."
_MET: Counter[str] = Counter()
_COUNTED_IN = 1 << 16


def in_group() -> bool:
    """Whether this process works in a group, possibly of itself alone."""
    return dist.is_available() and dist.is_initialized()


def several() -> bool:
    """Whether this is one of several processes that work together."""
    return in_group() and dist.get_world_size() > 1


def loaded_by_one() -> bool:
    """Whether transformers was told to load weights in one process of a machine alone, for accelerate to send later."""
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return in_group() and all(
        os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on") for name in switches
    )


def one_for_all(name: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `make` gives, computed by the first process of the default group and sent to the others.

    Not every program builds its model in all processes at once: one may do so alone, or before the others. So no
    process waits for another longer than `WAIT`; if one is missing then, everyone who comes computes for itself.

    Args:
        name: what is computed; equal in processes exactly when `make` would give the same.
        make: the computation.

    Returns:
        The tensors; those that were sent are on the CPU.
    """
    if not several():
        return make()
    store = dist.distributed_c10d._get_default_store()
    rank, others = dist.get_rank(), range(1, dist.get_world_size())
    kind = f"isotune/{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    _MET[name] += 1
    place = f"{kind}/{_MET[name]}"
    if rank == 0:
        store.set(f"{place}/coming", "1")
        try:
            made = make()
        except BaseException:
            store.set(f"{place}/decision", "")  # the others will see for themselves what is wrong
            raise
        _wait(store, [f"{place}/{other}" for other in others], WAIT)
        # A process has added 1, and another 1 if it has left; what is added here makes it stay.
        here = [store.add(f"{place}/{other}", _COUNTED_IN) == _COUNTED_IN + 1 for other in others]
        shapes = [(list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in made]
        store.set(f"{place}/decision", json.dumps(shapes) if all(here) else "")
        return _sent(made) if all(here) else made
    arrived = store.add(f"{place}/{rank}", 1)
    while arrived > _COUNTED_IN and _wait(store, [f"{kind}/{_MET[name] + 1}/coming"], WAIT):
        # The first process has been here without this one, and is at the next meeting by now.
        _MET[name] += 1
        place = f"{kind}/{_MET[name]}"
        arrived = store.add(f"{place}/{rank}", 1)
    if arrived == 1 and not _wait(store, [f"{place}/coming"], WAIT) and store.add(f"{place}/{rank}", 1) == 2:
        return make()
    _wait(store, [f"{place}/decision"], timedelta(days=1))
    decision = store.get(f"{place}/decision").decode()
    if not decision:
        return make()
    return _sent([torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in json.loads(decision)])


def _wait(store: Any, keys: list[str], limit: timedelta) -> bool:
    try:
        store.wait(keys, limit)
    except RuntimeError:  # what a store raises when the time is over
        return False
    return True


def _sent(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The first process's values of equally shaped tensors."""
    kinds = dict(part.split(":") for part in dist.get_backend_config().split(","))
    device = torch.device("cpu") if "cpu" in kinds else torch.device(next(iter(kinds)))
    found = []
    for tensor in tensors:
        moved = tensor.to(device).contiguous()
        dist.broadcast(moved, src=0)
        found.append(moved.cpu())
    return found


def sample_of(weight: Tensor, count: int = 64) -> list[float]:
    """A few entries, by which processes see that they hold the same weight; none of one that they hold together."""
    if is_sharded(weight):
        return []
    while hasattr(weight, "__tensor_flatten__"):  # quantised: the tensor inside that holds the numbers
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    flat = weight.detach().reshape(-1)
    chosen: list[float] = flat[:: max(1, flat.numel() // count)][:count].float().tolist()
    return chosen


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes (there may be one only), by FSDP2 or by ZeRO-3."""
    return is_divided(tensor) or (in_group() and isinstance(tensor, _distributed_tensor()))


def is_divided(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter of DeepSpeed ZeRO-3: empty but for the times when it is gathered."""
    return hasattr(tensor, "ds_id")


def is_whole(tensor: Tensor) -> bool:
    """Whether all elements of the tensor are here now."""
    if is_divided(tensor):
        return bool(tensor.ds_status.name == "AVAILABLE")  # type: ignore[attr-defined]
    return not is_sharded(tensor)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the tensor with all its elements."""
    shape: torch.Size = tensor.ds_shape if is_divided(tensor) else tensor.shape  # type: ignore[attr-defined]
    return shape


def gathered(tensor: Tensor) -> Tensor:
    """The tensor with all its elements; where it is spread, every process that has a part must ask.

    What ZeRO-3 has divided comes without a graph.
    """
    if is_whole(tensor):
        return tensor
    if is_divided(tensor):
        with whole([tensor]):
            return tensor.data  # what the parameter loses at the end of the block, this keeps
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A block in which those parameters that ZeRO-3 has divided are here; every process must enter it."""
    absent = [parameter for parameter in parameters if is_divided(parameter) and not is_whole(parameter)]
    with _zero().GatheredParameters(absent) if absent else nullcontext():
        yield


def gather_with(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have ZeRO-3 gather parameters of other modules too when it gathers those of `module`, forward and backward.

    Args:
        module: whose forward reads them.
        parameters: those that ZeRO-3 has not divided are left out.
    """
    known = module.__dict__.get("_external_params", {})
    for parameter in parameters:
        if is_divided(parameter) and id(parameter) not in known:
            _zero().register_external_parameter(module, parameter)


def _zero() -> Any:
    # A parameter that ZeRO-3 has divided can exist only if somebody else has imported DeepSpeed.
    return sys.modules["deepspeed"].zero


def keep_buffers_at_home(model: nn.Module, names: Sequence[str]) -> None:
    """Have DistributedDataParallel leave these buffers of a model alone, in place of those that were named before.

    It would send all buffers from the first process to the others at every step. Those of an adapter are the same
    everywhere from the start and never change.

    Args:
        model: which is wrapped itself, or as the base model of a PeftModel.
        names: of its buffers.
    """
    before: set[str] = model.__dict__.pop("_isotune_at_home", set())
    ignored = set(model.__dict__.pop(_IGNORED, ())) - before
    own = {prefix + name for name in names for prefix in ("", _WITHIN_PEFT)}
    if own:
        model.__dict__["_isotune_at_home"] = own
    if ignored | own:
        # What DistributedDataParallel._set_params_and_buffers_to_ignore_for_model sets.
        model.__dict__[_IGNORED] = sorted(ignored | own)


def _distributed_tensor() -> type[Tensor]:
    from torch.distributed.tensor import DTensor

    return DTensor


def average_gradients(parameters: nn.Module | Iterable[Tensor]) -> None:
    """Replace gradients by their mean over all processes, for adapters that `fully_shard` was told to ignore.

    Call it after the last backward pass before a step. Every process must have the same parameters; a missing gradient
    counts as zero, unless all processes lack it.

    Args:
        parameters: or a module, for those of it that are trained; what is sharded is left to its owner.
    """
    if not several():
        return
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in given:
        if parameter.requires_grad and not is_sharded(parameter):
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in groups.values():
        used = torch.tensor([p.grad is not None for p in members], dtype=torch.int32, device=members[0].device)
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in members])
        dist.all_reduce(used)
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, mean, somewhere in zip(
            members, torch.split(flat, [p.numel() for p in members]), used, strict=True
        ):
            if somewhere:
                parameter.grad = mean.view_as(parameter)
