"""train.report_to: what transformers' own callbacks are given, run by run; TensorBoard's files with it installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers.integrations import TensorBoardCallback

from isotune.experiments import execute, tracking
from isotune.experiments.compare import Options
from isotune.experiments.compare import plan as plan_comparison
from isotune.experiments.recipe import RecipeError, validate
from isotune.experiments.train import plan, train


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing_is_said_before_anything_is_read(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == tracker else find(name, *a))
    tiny["train"]["report_to"] = tracker
    tiny["data"]["path"] = "/no/such/folder"
    for planned in (plan, lambda recipe: plan_comparison("tiny", recipe, Options(), Path("x"))):
        with pytest.raises(RecipeError, match=rf"train\.report_to={tracker} needs {tracker}: pip install {tracker}"):
            planned(validate(tiny))


class Writer:
    """What TensorBoard's SummaryWriter is called with, by folder."""

    seen: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, log_dir: str) -> None:
        self.tags = self.seen.setdefault(log_dir, [])

    def add_text(self, tag: str, text: str, step: int = 0) -> None:
        self.tags.append(text if tag == "args" else tag)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.tags.append(tag)

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.slow
def test_each_run_is_reported_under_its_own_name_and_folder(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_writer(callback: TensorBoardCallback) -> None:
        callback._SummaryWriter, callback.tb_writer = Writer, None
        callback.logging_dir = os.environ["TENSORBOARD_LOGGING_DIR"]

    Writer.seen = {}
    monkeypatch.setattr(TensorBoardCallback, "__init__", with_writer)
    monkeypatch.setattr(execute, "_missing", lambda *names: [])
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    tiny["baselines"] = ["head"]
    tiny["train"] |= {"report_to": "tensorboard", "lr": [0.01, 0.02]}
    first = train(validate(tiny))
    logs = Path(tiny["output"]).resolve() / "logs"
    names = ("head-lr=0.01", "head-lr=0.02", "psoft-lr=0.01", "psoft-lr=0.02")
    assert set(Writer.seen) == {str(logs / name) for name in names}
    for name, tags in zip(names, Writer.seen.values(), strict=True):
        assert {"train/loss", "eval/accuracy"} <= set(tags)
        assert f'"run_name": "run {name.replace("-lr=", " lr ")} seed 0"' in tags[0]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    # It makes no other experiment of it, and nothing is trained again.
    tiny["train"]["report_to"] = []
    assert train(validate(tiny)) == first


def test_what_counts_runs_of_a_process_is_ended_after_each(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def finish(name: str) -> None:
        if name == "trackio" and name in ended:
            raise RuntimeError("Call trackio.init() before trackio.finish().")  # as it does where no run goes on
        ended.append(name)

    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.finish = partial(finish, name)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(execute, "_missing", lambda *names: [])
    monkeypatch.setenv("WANDB_DIR", "mine")
    tiny["train"]["report_to"] = ["wandb", "trackio"]
    schedule = plan(validate(tiny))
    (run,) = schedule.search(schedule.variants[0])
    with tracking.tracked(run) as given:
        assert given == {"report_to": ["wandb", "trackio"], "run_name": "run psoft lr 0.02 seed 0"}
        assert os.environ["WANDB_DIR"] == "mine"
        assert not ended
    assert sorted(ended) == ["trackio", "wandb"]
    assert os.environ["WANDB_DIR"] == "mine"
    # transformers' callback ends trackio's run at the end of a training itself.
    with pytest.raises(KeyError), tracking.tracked(run):
        raise KeyError
    assert sorted(ended) == ["trackio", "wandb", "wandb"]
