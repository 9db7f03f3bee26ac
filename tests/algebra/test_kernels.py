"""The Triton kernels, in a process of their own: Triton interprets all kernels of one or none."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

CASES = ("block_kernels_on_device.py", "elimination_kernels_on_device.py", "layer_kernels_on_device.py")
INSTALLED = importlib.util.find_spec("triton") is not None
LOOPS = INSTALLED and (
    Version(importlib.metadata.version("triton")) >= Version("3.7") or Version(np.__version__) < Version("2.4")
)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize(
    "interpreted",
    [
        pytest.param(
            True,
            id="interpreter",
            marks=pytest.mark.skipif(
                not LOOPS, reason="Triton's interpreter before 3.7 counts no loops with NumPy from 2.4 on"
            ),
        ),
        pytest.param(
            False,
            id="gpu",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ],
)
def test_against_plain_torch(interpreted: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    call = [sys.executable, "-m", "pytest", "-x", *(Path(__file__).with_name(name) for name in CASES)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
