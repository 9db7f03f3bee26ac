"""Several processes: one finds what all need, weights that are spread over them are gathered, replicas stay equal."""

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
"""How long processes wait for each other before each computes for itself."""

_MET: Counter[str] = Counter()
_COUNTED_IN = 1 << 16


def several() -> bool:
    """Whether this is one of several processes that work together in the default group."""
    return in_group() and dist.get_world_size() > 1


def loaded_by_one() -> bool:
    """Whether transformers loads weights in one process of a machine alone, for accelerate to send later."""
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
    """A few entries, by which processes see that they hold the same weight; none of one that they hold together.

    Args:
        weight: of any shape; of a quantised one the packed numbers are taken.
        count: about how many.
    """
    if is_sharded(weight):
        return []
    while hasattr(weight, "__tensor_flatten__"):  # quantised: the tensor inside that holds the numbers
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    flat = weight.detach().reshape(-1)
    chosen: list[float] = flat[:: max(1, flat.numel() // count)][:count].float().tolist()
    return chosen


def average_gradients(parameters: nn.Module | Iterable[Tensor]) -> None:
    """Replace gradients by their mean over all processes, for adapters among the `ignored_params` of `fully_shard`.

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
