"""Faults of the machine: no room on the disk, and a process killed at any moment."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from isotune.experiments import execute as execute_module
from isotune.experiments import loop, progress
from isotune.experiments.files import StorageError, storing
from isotune.experiments.recipe import validate
from trainings import run, train_with


@pytest.fixture
def room(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[int], None]]:
    """`room(n)`: from here on no file may grow beyond n bytes, as on a disk that is full.

    What is printed is captured in memory by `capsys`, or pytest's own files would be full too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails, and the process lives
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    class Act(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == step:
                act()

    train_with(Act(), monkeypatch)


@pytest.mark.parametrize("size", [0, 3000])
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, room: Callable[[int], None], tmp_path: Path, size: int
) -> None:
    tiny["train"]["select_best"] = False
    whole = run(validate({**tiny, "output": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda: room(size))
        with pytest.raises(StorageError, match=r"cannot write the checkpoint of step 16 in .*when it can be") as caught:
            run(validate(tiny))
    assert "\n" not in str(caught.value)
    folder = Path(tiny["output"]) / "psoft"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]
    assert progress.last_checkpoint(folder) == folder / "checkpoint-8"
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    assert run(validate(tiny))["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)


@pytest.mark.slow
def test_a_full_disk_while_the_adapter_or_the_record_is_written_is_one_line(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, room: Callable[[int], None]
) -> None:
    original = loop.train

    def then_full(*arguments: Any, **options: Any) -> Any:
        outcome = original(*arguments, **options)
        room(100)
        return outcome

    monkeypatch.setattr(loop, "train", then_full)
    with pytest.raises(StorageError, match=r"cannot write the trained weights in .*run the same command"):
        run(validate(tiny))
    folder = Path(tiny["output"])
    assert not (folder / "comparison.json").exists()
    assert progress.last_checkpoint(folder / "psoft") is not None  # the next attempt goes on from there


@pytest.fixture
def stopped(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run stopped after its last step, when no checkpoint would be saved any more."""

    def stop(*arguments: Any) -> Path:
        raise KeyboardInterrupt

    tiny["train"] |= {"epochs": 6, "eval_steps": 4, "lr": [0.3]}
    with monkeypatch.context() as patch:
        patch.setattr(execute_module, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(validate(tiny))
    return Path(tiny["output"])


@pytest.mark.slow
def test_a_run_moved_before_its_end_still_has_its_best_checkpoint(
    stopped: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(stopped, moved)
    in_place = run(validate(tiny))["runs"][0]
    assert in_place["best_step"] < max(row["step"] for row in in_place["curve"])  # or the last would do
    shutil.rmtree(stopped)
    elsewhere = run(validate({**tiny, "output": str(moved)}))["runs"][0]
    for key in ("best_step", "validation", "test"):
        assert elsewhere[key] == in_place[key]


@pytest.mark.slow
def test_a_best_checkpoint_that_is_gone_is_asked_for(stopped: Path, tiny: dict[str, Any]) -> None:
    last = progress.last_checkpoint(stopped / "psoft")
    (best,) = (path for path in stopped.glob("psoft/checkpoint-*") if path != last)
    shutil.rmtree(best)
    with pytest.raises(ValueError, match=rf"{best.name}, the best checkpoint so far, is gone; put it back, or remove"):
        run(validate(tiny))


def test_what_is_no_failed_write_is_no_storage_error() -> None:
    with pytest.raises(KeyError), storing("x"):
        raise KeyError("a bug")


# Where a run is killed, one after the other: (owner, attribute) of what is about to be called for the first time in a
# process, or, with a name, with a file or folder of that name.
MOMENTS: list[tuple[Any, str, str]] = [
    (os, "replace", "experiment.json"),
    (loop.Loop, "training_step", ""),
    (torch, "save", "optimizer.pt"),
    (os, "replace", "seconds.json"),
    (shutil, "rmtree", ""),
    (loop.Loop, "predict", ""),
    (execute_module, "_save", ""),
    (os, "replace", "predictions.json"),
    (os, "replace", "run.json"),
    (os, "replace", "comparison.json"),
]


def killed(recipe: dict[str, Any], owner: Any, attribute: str, name: str) -> int:
    """Run in a process of its own that is killed at a moment; returns how it ended."""
    child = os.fork()
    if child == 0:
        original = getattr(owner, attribute)

        def call(*arguments: Any, **options: Any) -> Any:
            if not name or any(Path(str(argument)).name == name for argument in arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, attribute, call)
        try:
            run(validate(recipe))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train"] |= {"eval_steps": 4}
    whole = run(validate({**tiny, "output": str(tmp_path / "whole")}))
    for moment in MOMENTS:
        assert killed(tiny, *moment) == -signal.SIGKILL, moment
    resumed = run(validate(tiny))
    assert resumed["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)
    first, second = (result["runs"][0] for result in (resumed, whole))
    assert (first["best_step"], first["validation"]) == (second["best_step"], second["validation"])
    assert [row["step"] for row in first["curve"]] == [row["step"] for row in second["curve"]]
    one, other = (
        load_file(folder / "psoft" / "adapter" / "adapter_model.safetensors")
        for folder in (Path(tiny["output"]), tmp_path / "whole")
    )
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-6)
