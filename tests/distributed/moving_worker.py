"""What each process of tests/moving/test_moving_training.py does; run by torchrun, or called in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from distributed.worker import RATE, ROWS, adapted, main, refused, sharded
from helpers import layers_of, some_tokens, trainable
from isotune.moving import MovingSchedule, UoraSchedule

STEPS = 12
TRAINED = (("psoft", "top"), ("psoft", "band"), ("psoft", "gradient"), ("rosa", "band"))
"""Methods, and how their schedule selects."""
UORA = "uora"
"""In place of a selection: rows of UORA are renewed instead."""


def batches(rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    rows = [some_tokens(ROWS, 9, seed=seed)[rank::size] for seed in (5, 6)]
    return [{"input_ids": one, "labels": one} for one in rows]


def train(model: Any, select: Any, rank: int = 0, size: int = 1, *, zero: bool = False) -> list[float]:
    """The loss of all rows at each step, of a training that moves after the fourth and the eighth.

    Args:
        model, select: the model, and how its schedule selects.
        rank, size: of this process.
        zero: whether each process keeps the moments of a share of the parameters alone.
    """
    given = {"batches": batches(rank, size)} if select == "gradient" else {}
    schedule: Any
    if select == UORA:
        schedule = UoraSchedule(threshold=1.0, weight=0.4, every=4)
    else:
        schedule = MovingSchedule(4, select=select, optimizer_state="project", **given)
    own = trainable(model).values()
    optimizer: Any = (
        ZeroRedundancyOptimizer(own, torch.optim.AdamW, lr=RATE) if zero else torch.optim.AdamW(own, lr=RATE)
    )
    losses = []
    for step in range(STEPS):
        rows = some_tokens(ROWS, 9, seed=step % 3)[rank::size]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        schedule.step(model, optimizer)
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / size)
    assert [move.done for move in schedule.history] == [4, 8, 12]
    return losses


def run(out: Path) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for method, select in TRAINED:
        name = f"{method} {select}"
        replica = nn.parallel.DistributedDataParallel(adapted(method))
        found[name] = train(replica, select, rank, size)
        stored = [tensor for layer in layers_of(replica) for tensor in layer.stored_of("default")]
        found[f"{name} stored"] = [float((t * torch.arange(1, t.numel() + 1).view(t.shape)).sum()) for t in stored]
    found["zero"] = train(nn.parallel.DistributedDataParallel(adapted("psoft")), "band", rank, size, zero=True)
    found[UORA] = train(replica := nn.parallel.DistributedDataParallel(adapted(UORA)), UORA, rank, size)
    found["counts"] = [layer.adapter("default").reinitializations.tolist() for layer in layers_of(replica)]
    model = sharded(adapted("psoft"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found["fsdp uora"] = refused(
        lambda: UoraSchedule(threshold=0.1, weight=0.4, every=1).step(sharded(adapted(UORA)), None)
    )
    found["fsdp"] = refused(lambda: MovingSchedule(1).step(model, optimizer))
    return found


if __name__ == "__main__":
    main(run)
