"""`benchmarks/gpu_constants.py`: what a results file of the GPU benchmark says about a plan."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from scripts import ROOT, run_script

pytestmark = [
    pytest.mark.slow,  # each run is a process
    pytest.mark.skipif(not (ROOT / "benchmarks" / "gpu_bench").is_dir(), reason="needs the variants of gpu_bench"),
]
PEAK = 989.4e12


def run(results: dict[str, Any], folder: Path) -> CompletedProcess[str]:
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return run_script("benchmarks/gpu_constants.py", str(path), "--folder", str(folder / "out"), folder=folder)


def piece(
    card: str, shape: str = "3b", *, checkpointing: bool = False, complete: bool = True, **milliseconds: float
) -> dict[str, Any]:
    variants = {name.replace("_", " ").replace("~", "="): {"ms": ms} for name, ms in milliseconds.items()}
    return {
        "environment": {"card": card, "torch": "2.11", "isotune": f"{checkpointing}"},
        "complete": complete,
        "errors": {},
        "shape": shape,
        "layers": 2,
        "batch": 1,
        "tokens": 512,
        "checkpointing": checkpointing,
        "variants": variants,
    }


def test_the_share_is_of_the_operations_that_a_plan_counts(tmp_path: Path) -> None:
    card = "NVIDIA H100 80GB HBM3"
    times = {"frozen": 1.0, "PEFT_LoRA_r~16": 4.0, "PEFT_PSOFT_r~46_exact": 9.0, "isotune_PSOFT_r~46": 3.0}
    pieces = {
        "step/3b/1x": piece(card, **times),
        "step/3b/checkpointing": piece(card, checkpointing=True, **{"PEFT_LoRA_r~16": 4.0}),
        "step/1b/1x": piece(card, "1b", **{"PEFT_LoRA_r~16": 1e-3}),
        "step/3b/4x": piece(card, complete=False, **{"PEFT_LoRA_r~16": 1e-3}),
    }
    done = run({"pieces": pieces}, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "h100.json").read_text())
    assert card in found["about"]
    assert set(found["utilization"]) == {"lora", "psoft"}
    # Of weights alone: two products forward and backward, three with checkpointing; the median of two is their mean.
    weights = 2 * 512 * 2 * (3072 * (2 * 3072 + 2 * 1024) + 3 * 3072 * 8192)
    assert 1.0 < found["utilization"]["psoft"] / (2 * weights / 3e-3 / PEAK) < 1.1
    assert 1.0 < found["utilization"]["lora"] / (2.5 * weights / 4e-3 / PEAK) < 1.1


def test_a_card_of_another_speed_is_refused(tmp_path: Path) -> None:
    done = run({"pieces": {"step/1b/1x": piece("NVIDIA H100 PCIe", **{"PEFT_LoRA_r~16": 4.0})}}, tmp_path)
    assert done.returncode != 0
    assert "NVIDIA H100 PCIe" in done.stderr
    assert not (tmp_path / "out").exists()
