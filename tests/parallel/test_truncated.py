"""Truncated weights (CERSA's truncate_base) in several processes: what DDP and FSDP2 train is what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distributed import truncated_worker
from helpers import torchrun


@pytest.mark.slow
def test_wrapped_afterwards(tmp_path: Path) -> None:
    torchrun(2, Path(truncated_worker.__file__), tmp_path)
    start, alone = truncated_worker.adapted(), truncated_worker.train(truncated_worker.adapted())
    untrained = start(torch.randn(truncated_worker.ROWS, 12, generator=torch.Generator().manual_seed(1)))
    assert alone != pytest.approx(untrained.detach().flatten().tolist(), abs=1e-2)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for kind in ("ddp", "fsdp2"):
            assert found[kind] == pytest.approx(alone, abs=1e-5), kind
