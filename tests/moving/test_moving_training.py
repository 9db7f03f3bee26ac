"""Trainings whose subspaces move: by transformers' Trainer, resumed from any checkpoint, and in several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from distributed import moving_worker, worker
from helpers import PROCESSES, layers_of, some_tokens, tiny_llama
from isotune import get_peft_model
from isotune.methods import METHODS
from isotune.moving import MovingSchedule, UoraSchedule
from scripts import torchrun

STEPS = 9


def trainer(folder: Path, schedule: Any, method: str = "psoft", model: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    if model is None:
        model = get_peft_model(tiny_llama(layers=1), METHODS[method](r=4, target_modules=["q_proj", "v_proj"]))
    rows = [{"input_ids": row, "labels": row} for row in some_tokens(16, 9, seed=3)]
    settings = TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
            **options,
        },
    )
    return Trainer(model, settings, train_dataset=rows, eval_dataset=rows, callbacks=[schedule])


def curve(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "every", "unit", "boundaries", "stops"),
    [
        ("psoft", 3, "step", [3, 6], (2, 3)),
        ("psoft", 1, "epoch", [1, 2], (3, 4)),
        ("rosa", 1, "epoch", [1, 2], (3, 4)),
    ],
)
def test_a_resumed_training_has_the_same_curve(
    method: str, every: int, unit: Any, boundaries: list[int], stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Between boundaries and at them, without a move more or less."""

    def schedule() -> MovingSchedule:
        return MovingSchedule(every, unit=unit, select="band", optimizer_state="project")

    whole = schedule()
    trained = trainer(tmp_path / "whole", whole, method)
    trained.train()
    expected = curve(trained)
    assert [move.done for move in whole.history] == boundaries
    logits = trained.model.eval()(input_ids=some_tokens()).logits
    for stop in stops:
        part = schedule()
        again = trainer(tmp_path / f"from-{stop}", part, method)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert curve(again) == pytest.approx(expected, abs=1e-6)
        steps = [done * 4 if unit == "epoch" else done for done in boundaries]
        assert [move.done for move in part.history] == [
            done for done, step in zip(boundaries, steps, strict=True) if step >= stop
        ]
        torch.testing.assert_close(again.model.eval()(input_ids=some_tokens()).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "unit", "every", "boundaries"),
    [("psoft", "step", 3, [3, 6, 9, 12]), ("rosa", "epoch", 1, [1, 2, 3, 4]), ("uora", "step", 3, [3, 6, 9, 12])],
)
def test_a_moved_adapter_moves_on_in_a_new_training(
    method: str, unit: Any, every: int, boundaries: list[int], tmp_path: Path
) -> None:
    """The Trainer counts anew, the adapter does not; also in a new training that is resumed, or of the same Trainer."""

    def schedule() -> Any:
        if method == "uora":
            return UoraSchedule(threshold=1e-6, weight=0.5, every=every, unit=unit)
        return MovingSchedule(every, unit=unit, select="band")

    first, second = schedule(), schedule()
    trained = trainer(tmp_path / "first", first, method)
    trained.train()
    assert [move.done for move in first.history] == boundaries[:2]
    trained.model.save_pretrained(tmp_path / "adapter")

    def loaded() -> PeftModel:
        return PeftModel.from_pretrained(tiny_llama(layers=1), tmp_path / "adapter", is_trainable=True)

    again = trainer(tmp_path / "second", second, model=loaded())
    again.train()
    assert [move.done for move in second.history] == boundaries[2:]
    for stop in (3, 4, 5):
        part = schedule()
        resumed = trainer(tmp_path / "part", part, model=loaded())
        resumed.train(resume_from_checkpoint=str(tmp_path / "second" / f"checkpoint-{stop}"))
        steps = [done * 4 if unit == "epoch" else done for done in boundaries[:2]]
        assert [move.done for move in part.history] == [
            done for done, step in zip(boundaries[2:], steps, strict=True) if step >= stop
        ]
    again.train()
    assert [move.done for move in second.history[2:]] == [boundaries[-1] + done for done in boundaries[:2]]


def test_the_best_checkpoint_of_before_a_move_is_taken_in_the_end(tmp_path: Path) -> None:
    schedule = MovingSchedule(2, select="band")
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5}
    trained = trainer(tmp_path, schedule, **options)
    trained.train()
    best = trained.state.best_global_step
    scores = {entry["step"]: entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry}
    assert best < STEPS
    assert trained.evaluate()["eval_loss"] == pytest.approx(scores[best], abs=1e-6)
    saved = json.loads((tmp_path / f"checkpoint-{best}" / "adapter_config.json").read_text())
    trained.model.save_pretrained(tmp_path / "best")
    again = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    assert again.get("accumulated_ranks") == saved.get("accumulated_ranks")


@pytest.fixture(scope="module", params=[pytest.param(count, marks=pytest.mark.slow) for count in PROCESSES])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp(f"moving-{request.param}")
    return torchrun(request.param, moving_worker.__file__, folder)


def test_several_processes_give_the_curve_of_one(processes: list[Any]) -> None:
    for method, select in moving_worker.TRAINED:
        alone = moving_worker.train(worker.adapted(method), select)
        assert alone[-1] < alone[0]
        for found in processes:
            assert found[f"{method} {select}"] == pytest.approx(alone, abs=1e-4), (method, select)
            assert found[f"{method} {select} stored"] == processes[0][f"{method} {select} stored"]


def test_processes_that_share_the_moments_have_the_curve_of_one(processes: list[Any]) -> None:
    alone = moving_worker.train(worker.adapted("psoft"), "band")
    for found in processes:
        assert found["zero"] == pytest.approx(alone, abs=1e-4)


def test_several_processes_renew_the_rows_of_one(processes: list[Any]) -> None:
    alone = moving_worker.train(model := worker.adapted("uora"), moving_worker.UORA)
    counts = [layer.adapter("default").reinitializations.tolist() for layer in layers_of(model)]
    assert any(map(sum, counts))
    for found in processes:
        assert found["uora"] == pytest.approx(alone, abs=1e-4)
        assert found["counts"] == counts


def test_a_sharded_model_is_refused(processes: list[Any]) -> None:
    assert all("FSDP" in found["fsdp"] and "FSDP" in found["fsdp uora"] for found in processes)
