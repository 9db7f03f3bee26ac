"""Truncated weights (CERSA's truncate_base) in several processes: what DDP and FSDP2 train is what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed import truncated_worker
from scripts import torchrun


@pytest.mark.slow
def test_wrapped_afterwards(tmp_path: Path) -> None:
    start, alone = truncated_worker.adapted(), truncated_worker.train(truncated_worker.adapted())
    untrained = start(torch.randn(truncated_worker.ROWS, 12, generator=torch.Generator().manual_seed(1)))
    assert alone != pytest.approx(untrained.detach().flatten().tolist(), abs=1e-2)
    for found in torchrun(2, truncated_worker.__file__, tmp_path):
        for kind in ("ddp", "fsdp2"):
            assert found[kind] == pytest.approx(alone, abs=1e-5), kind
