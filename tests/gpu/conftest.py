"""Marks what is in this folder, and skips it where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU nothing here runs, unless ISOTUNE_GPU_TESTS=cpu asks for what a CPU can do of it."""
    import torch

    missing = "ISOTUNE_GPU_TESTS" not in os.environ and not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                reason = "needs an NVIDIA GPU; ISOTUNE_GPU_TESTS=cpu tries what a CPU can do of it"
                item.add_marker(pytest.mark.skip(reason=reason))
