"""`benchmarks/gpu.py` on the CPU: its figures, that it continues, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import ROOT, run_script

pytestmark = pytest.mark.slow  # each run is a process

MEASURED = ROOT / "benchmarks" / "results" / "gpu" / "h100.json"
COMMAND = "benchmarks/gpu.py"
SECTIONS = ("step/8b", "start", "decode/eager/batch=1", "decode/graph/batch=1", "graph", "profile")


def run(output: Path, *options: str, code: int = 0) -> str:
    """What the dry run prints."""
    # Not in this process: the command replaces methods to count, and loads the profiler.
    ended = run_script(COMMAND, "--dry-run", "-o", str(output), *options, folder=output.parent)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


def pieces_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.read_text())["pieces"]
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file and the output of a dry run of what matters most."""
    output = tmp_path_factory.mktemp("gpu") / "results.json"
    return output, run(output, "--only", *SECTIONS)


def test_every_variant_has_its_figures_and_nothing_fails(first: tuple[Path, str]) -> None:
    pieces = pieces_of(first[0])
    assert len(pieces) == 5 + 6 + 2 + 1 + 1
    for name, piece in pieces.items():
        assert piece["complete"], name
        assert piece["errors"] == {}, name
        assert piece["seconds"] >= 0
    race = pieces["step/8b/1x"]["variants"]
    assert len(race) == 18
    for row in race.values():
        assert row["ms"] >= row["host_ms"] > 0
        assert row["ratio"] > 0
        assert row["tokens_per_s"] > 0
        assert row["init_s"] > 0
        assert row["rounds"] == 2
        assert row["peak_gib"] is None  # only a GPU tells
    whole = pieces["step/8b/whole"]
    assert whole["layers"] == 2  # of a shape that has as many
    assert len(whole["variants"]) == 8
    assert {"PEFT HRA r=8", "PEFT BOFT m=2 b=8"} < set(pieces["step/8b/heavy"]["variants"])
    for name in ("step/8b/1x", "step/8b/whole", "step/8b/heavy", "step/8b/4x", "step/8b/checkpointing", "graph/8b"):
        assert pieces[name]["variants"]["PEFT LoRA r=16"]["ratio"] == 1
    for name in ("decode/eager/batch=1", "decode/graph/batch=1"):
        assert pieces[name]["variants"]["frozen"]["ratio"] == 1
        assert len(pieces[name]["variants"]) == 6
    for row in pieces["decode/eager/batch=1"]["variants"].values():
        assert row["evaluations_after_first_token"] == 0
    for row in pieces["profile/8b"]["variants"].values():
        assert 0 < len(row["top"]) <= 10
        assert row["kernels"] >= sum(kernel["count"] for kernel in row["top"])
        assert 0 < sum(kernel["share"] for kernel in row["top"]) <= 1.001


def test_the_start_is_right(first: tuple[Path, str]) -> None:
    pieces = pieces_of(first[0])
    for rank in (4, 12):
        whole = pieces[f"start/8b/r={rank}"]
        assert whole["subspaces"] == 14
        assert whole["seconds_to_solve"] > 0
        assert whole["error_of_update_after_reload"] < 1e-4
    layers = [piece for name, piece in pieces.items() if name.startswith("start/layer/")]
    assert len(layers) == 4
    assert sum("torch.linalg.svd r=12" in piece["solvers"] for piece in layers) == 1
    for piece in layers:
        for name, row in piece["solvers"].items():
            if not name.startswith("torch.svd_lowrank"):  # which iterates a fixed number of times
                assert row["sine"] < 1e-3, name
                assert abs(row["energy_missed"]) < 1e-5, name
    assert sum(piece.get("reference_to_float64_svd", 0) for piece in layers) < 1e-10


def test_a_second_run_measures_nothing_again_but_what_is_asked_for(first: tuple[Path, str]) -> None:
    output, printed = first
    before = pieces_of(output)
    assert "step/8b/1x: " in printed
    again = run(output, "--only", *SECTIONS)
    assert pieces_of(output) == before
    assert again.strip() == run(output, "--show").strip()
    run(output, "--only", "graph", "--again", "graph", "--processes")
    after = pieces_of(output)
    assert [name for name in before if before[name] != after[name]] == ["graph/8b"]


def test_the_table_shows_every_piece(first: tuple[Path, str]) -> None:
    output, printed = first
    for name, piece in pieces_of(output).items():
        assert f"\n{name}: none: a dry run" in printed
        for variant in piece.get("variants", {}):
            assert f"\n  {variant}" in printed


def test_what_does_not_fit_is_left_out_and_an_unknown_section_named(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert "step/8b/1x: left out" in run(output, "--minutes", "-1", "--only", "step/8b/1x")
    assert not output.exists()
    run(output, "--only", "stepp", code=1)


def test_an_interrupted_run_leaves_a_good_file_that_the_next_one_goes_on_with(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    sections = "start", "decode/eager"  # the second takes seconds: a busy machine may send the signal late
    call = [sys.executable, COMMAND, "--dry-run", "-o", str(output), "--only", *sections]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        child.send_signal(signal.SIGINT)
        printed, said = child.communicate()
    assert child.returncode == 130, said
    assert "interrupted" in said
    done = line.split(": ")[0]
    before = pieces_of(output)
    assert before[done]["complete"]
    assert f"\n{done}: none: a dry run" in printed
    run(output, "--only", *sections)
    after = pieces_of(output)
    assert len(after) == 8
    assert all(piece["complete"] for piece in after.values())
    assert after[done] == before[done]


TESTS = """
import pytest

def test_passes(): pass

@pytest.mark.parametrize("size", [1, 2])
def test_fails(size): assert size == 1

def test_skips(): pytest.skip("there is no GPU (here)")
"""


def test_the_tests_are_counted(tmp_path: Path) -> None:
    folder, output = tmp_path / "tests", tmp_path / "results.json"
    folder.mkdir()
    (folder / "test_some.py").write_text(TESTS)
    printed = run(output, "--only", "right", "--tests", str(folder))
    piece = pieces_of(output)["right"]
    assert piece["errors"] == {}
    assert piece["passed"] == 2
    assert [name.rpartition("::")[2] for name in piece["failed"]] == ["test_fails[2]"]
    assert list(piece["skipped"].values()) == ["there is no GPU (here)"]
    assert "there is no GPU (here)" in printed
    assert "assert 2 == 1" in piece["output"]


def test_a_folder_without_tests_is_an_error_of_its_piece_alone(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    printed = run(output, "--only", "right", "--tests", str(tmp_path / "none"))
    piece = pieces_of(output)["right"]
    assert not piece["complete"]
    assert "FileNotFoundError" in piece["errors"]["right"]
    assert "failed: right: FileNotFoundError" in printed


def test_the_page_holds_what_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text((ROOT / "docs/evidence/speed.md").read_text())
    ended = run_script(COMMAND, "--write", str(page), "-o", str(MEASURED), folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert page.read_text() == (ROOT / "docs/evidence/speed.md").read_text()


def test_a_page_without_its_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text")
    assert run_script(COMMAND, "--write", str(page), "-o", str(MEASURED), folder=tmp_path).returncode == 1
    assert page.read_text() == "text"
