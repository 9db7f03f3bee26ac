"""What each process of tests/parallel/test_truncated.py does; run by torchrun, or called in one process."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from distributed.worker import main
from helpers import Chain, trainable
from isotune import CersaConfig, get_peft_model
from isotune.errors import IsotuneWarning

ROWS = 8


def adapted() -> Any:
    config = CersaConfig(r=4, base_rank_pattern={r"layers\.\d": 6}, target_modules=r"layers\.\d")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IsotuneWarning)
        return get_peft_model(Chain(), config)


def train(model: Any, rank: int = 0, size: int = 1) -> list[float]:
    """The outputs for all rows after four steps, of which each process has its share."""
    x, target = (torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    for _ in range(4):
        (model(x[rank::size]) - target[rank::size]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found: list[float] = model(x).detach().flatten().tolist()
    return found


def run(out: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    found = {"ddp": train(nn.parallel.DistributedDataParallel(adapted()), rank, size)}
    model, mesh = adapted(), init_device_mesh("cpu", (size,))
    for layer in model.get_base_model().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {**found, "fsdp2": train(model, rank, size)}


if __name__ == "__main__":
    main(run)
