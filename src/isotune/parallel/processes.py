"""Several processes: one computes what all need, and the gradients of replicas are averaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from isotune.internals.torch_state import common_store
from isotune.parallel.sharding import in_group, is_sharded

WAIT = timedelta(seconds=60)
"""How long processes wait for each other before each computes on its own."""

_MET: Counter[str] = Counter()
_COUNTED_IN = 1 << 16
_SAMPLES = 64


def several() -> bool:
    """Whether this is one of several processes that work together in the default group."""
    return in_group() and dist.get_world_size() > 1


def loaded_by_one() -> bool:
    """Whether transformers loads weights in just one process per machine, for accelerate to send later."""
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return in_group() and all(
        os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on") for name in switches
    )


def one_for_all(name: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Compute `make` in the first process of the default group and send the result to the others.

    Not every program builds its model in all processes at once: one process may do so alone, or before the others. So
    no process waits for another longer than `WAIT`; if one is missing by then, each computes on its own.

    Args:
        name: what is computed; equal in two processes if and only if `make` gives the same result.
        make: the computation.

    Returns:
        The tensors; those that were sent are on the CPU.
    """
    if not several():
        return make()
    store = common_store()
    rank, others = dist.get_rank(), range(1, dist.get_world_size())
    kind = f"isotune/{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    _MET[name] += 1
    place = f"{kind}/{_MET[name]}"
    if rank == 0:
        store.set(f"{place}/coming", "1")
        try:
            made = make()
        except BaseException:
            store.set(f"{place}/decision", "")  # the others will find the error themselves
            raise
        _wait(store, [f"{place}/{other}" for other in others], WAIT)
        # A process adds 1 when it arrives and 1 when it leaves; what is added here makes it stay.
        here = [store.add(f"{place}/{other}", _COUNTED_IN) == _COUNTED_IN + 1 for other in others]
        shapes = [(list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in made]
        store.set(f"{place}/decision", json.dumps(shapes) if all(here) else "")
        return _sent(made) if all(here) else made
    arrived = store.add(f"{place}/{rank}", 1)
    while arrived > _COUNTED_IN and _wait(store, [f"{kind}/{_MET[name] + 1}/coming"], WAIT):
        # The first process was here without this one, and is at the next meeting by now.
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
    except RuntimeError:  # a store raises this on timeout
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


def sample_of(weight: Tensor) -> list[float]:
    """A few entries by which processes recognise equal weights; empty for a sharded or partitioned weight.

    Args:
        weight: a weight of any shape; if quantised, packed values are taken.
    """
    if is_sharded(weight):
        return []
    while hasattr(weight, "__tensor_flatten__"):  # quantised: the tensor inside that holds the values
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    flat = weight.detach().reshape(-1)
    chosen: list[float] = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().tolist()
    return chosen


def average_gradients(parameters: nn.Module | Iterable[Tensor]) -> None:
    """Replace gradients by their mean over all processes, for adapters among the `ignored_params` of `fully_shard`.

    Call it after the last backward pass before a step. Every process must have the same parameters; a missing gradient
    counts as zero, unless all processes lack it.

    Args:
        parameters: the parameters, or a module whose trainable parameters are meant; sharded ones are left to FSDP.
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
