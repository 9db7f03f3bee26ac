"""`isotune train` in several processes: the result of one, written by one; a killed process costs one checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isotune.experiments import processes
from isotune.experiments.recipe import RecipeError, validate
from scripts import torchrun
from trainings import found_in, run

DIE = str(Path(__file__).parents[1] / "distributed" / "die.py")


@pytest.mark.slow
def test_a_run_killed_in_a_checkpoint_ends_as_one_process_would(tiny: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny["model"], model)
    config = json.loads((model / "config.json").read_text())
    # What a process drops it draws by itself, so that only without dropout two of them compute what one does.
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    tiny |= {"model": str(model), "pooling": "native"}
    expected = run(validate({**tiny, "output": str(tmp_path / "alone")}))

    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny))
    with pytest.raises(AssertionError, match="-9"):
        torchrun(2, DIE, tmp_path, "16")
    folder = Path(tiny["output"]) / "psoft"
    assert (folder / "checkpoint-8" / "trainer_state.json").exists()
    assert not (folder / "run.json").exists()

    # accelerate's launcher is torchrun's with more in the environment. Where there is no GPU the processes of
    # --multi_gpu compute on the CPU; with --cpu, accelerate starts several by MPI alone.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += ["-m", "isotune", "train", str(recipe)]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found = found_in(Path(tiny["output"]))
    assert found["runs"][0]["hardware"]["processes"] == 2
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    for one, other in zip(found["runs"][0]["curve"], expected["runs"][0]["curve"], strict=True):
        # Trainer fills a batch up with examples seen before so that all processes have one: in the validation loss,
        # and not in the scores, they count.
        for name in other:
            assert one[name] == pytest.approx(other[name], rel=1e-2 if name == "validation_loss" else 1e-3, abs=1e-4)
    assert resumed.stderr.count("24 test examples") == 1
    assert resumed.stdout.count("PSOFT r=4") == 1


def test_a_batch_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.share_of(7) == 7
    assert processes.is_main()
    processes.join()
    processes.wait_for_all()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.share_of(8) == 2
    with pytest.raises(RecipeError, match=r"batch of 6 .* 4 of them"):
        processes.share_of(6)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_launchers_that_spread_the_weights_are_refused(
    engine: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(RecipeError, match="without FSDP or DeepSpeed"):
        run(validate(tiny))


def test_a_comparison_is_not_to_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.require_alone("isotune compare")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        RecipeError, match=r"isotune compare starts .* started it 4 times; run it once, without torchrun"
    ):
        processes.require_alone("isotune compare")


def test_a_process_apart_has_nothing_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    alone = processes.environment_alone()
    assert "PATH" in alone
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"} & set(alone)
