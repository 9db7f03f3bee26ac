"""Whole experiments on a tiny BERT: results, resuming, interruption, NaN, reloading."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from exports import assert_exports
from isotune.experiments import encoded, forgetting, loop, models, progress, reload
from isotune.experiments.files import read_json, write_json
from isotune.experiments.recipe import RecipeError, validate
from isotune.experiments.records import RESULT
from isotune.experiments.table import table
from isotune.experiments.tasks.classification import mean_loss
from isotune.experiments.train import train
from trainings import run, train_with


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests themselves run in the background and ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Let `act(model)` happen at the start of a step, counted from 1."""

    class Act(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step + 1 == step:
                act(model)

    train_with(Act(), monkeypatch)


@pytest.mark.covered(method=("psoft",))
@pytest.mark.parametrize("method", ["psoft", "psoft_so", "lora", "dora"])
def test_an_adapter_is_trained_scored_and_saved(tiny: dict[str, Any], method: str) -> None:
    tiny["method"]["name"] = method
    result = run(validate(tiny))
    folder = Path(tiny["output"])
    assert json.loads((folder / RESULT).read_text()).items() <= result.items()
    entry = result["runs"][0]
    assert entry["head_parameters"] == 2 * 32 + 2
    assert 0 < entry["head_parameters"] < result["trainable_parameters"] < 10_000
    assert result["metrics"] == entry["test"]
    assert set(result["metrics"]) == {"accuracy", "matthews_correlation"}
    assert result["adapter_bytes"] == (folder / method / "adapter" / "adapter_model.safetensors").stat().st_size
    scored = [row["step"] for row in entry["curve"] if "validation_accuracy" in row]
    assert scored == [8, 16]
    assert entry["best_step"] in scored
    assert all(np.isfinite(row.get("loss", 0.0)) for row in entry["curve"])
    assert result["data"]["labels"] == ["0", "1"]
    assert result["data"]["majority_accuracy"] == 0.5
    # No pickle stays behind, and no checkpoint once there is nothing to resume.
    assert not any(name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name for name in files_of(folder))


def test_what_is_measured_on_the_way_is_no_part_of_the_training(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by a second at each step and by 100 whenever something is measured."""
    clock = [0.0]

    def later(seconds: float) -> float:
        clock[0] += seconds
        return 0.1

    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(forgetting.Forgetting, "change", lambda *_: later(100))
    at_step(monkeypatch, 2, lambda model: later(1))
    tiny["train"] |= {"max_steps": 2, "eval_steps": 1}
    (entry,) = run(validate(tiny))["runs"]
    assert [row["step"] for row in entry["curve"] if "forgetting" in row] == [1, 2]
    assert (entry["train_seconds"], entry["evaluation_seconds"]) == (1, 200)


def test_a_recipe_may_leave_out_what_is_forgotten(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting.Forgetting, "_look", None)
    tiny["train"]["max_steps"] = 2
    (entry,) = run(validate({**tiny, "measure_forgetting": False}))["runs"]
    assert entry["forgetting"] is None
    assert not any("forgetting" in row for row in entry["curve"])
    assert train(validate(tiny))["rows"][0]["forgetting"] is None  # the same experiment, which is over


@pytest.mark.parametrize(
    ("name", "moving", "boundary"),
    [("rosa", {"select": "band"}, 1), ("peso", {"every": 6, "unit": "step", "select": "warm"}, 2)],
)
@pytest.mark.slow
def test_subspaces_move_as_the_training_says(
    tiny: dict[str, Any], name: str, moving: dict[str, Any], boundary: int
) -> None:
    tiny["method"] = {"name": name, "r": 3, "train": {"moving": moving}}
    tiny["train"]["select_best"] = False
    result = run(validate(tiny))
    folder = Path(tiny["output"]) / name / "adapter"
    stored, tensors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    assert set(stored["accumulated_ranks"].values()) <= {3, 6}
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".moves")} == {boundary}
    assert all(np.isfinite(row.get("loss", 0.0)) for row in result["runs"][0]["curve"])


@pytest.mark.slow
def test_a_recipe_of_uora_renews_rows(tiny: dict[str, Any]) -> None:
    reinit = {"threshold": 0.1, "weight": 0.5, "every": 3}
    tiny["method"] = {"name": "uora", "r": 8, "target_modules": "all-linear", "train": {"lr": 0.05, "reinit": reinit}}
    result = run(validate(tiny))
    stored = load_file(Path(tiny["output"]) / "uora" / "adapter" / "adapter_model.safetensors")
    last = result["runs"][0]["best_step"] // 3
    history = {name.rpartition(".")[2]: t for name, t in stored.items() if ".isotune_operator.reinit" in name}
    assert 2 <= float(history["reinit_boundary"]) == last
    assert float(history["reinit_weight"]) == 0.5
    assert history["reinitializations"].any()


@pytest.mark.slow
def test_the_task_is_learnt(tiny: dict[str, Any]) -> None:
    tiny["method"] = "full"  # the encoder is random, so there is no knowledge to rotate
    tiny["train"] |= {"epochs": 15, "lr": 5e-3, "lr_head": 5e-3}
    assert run(validate(tiny))["metrics"]["accuracy"] >= 0.9


@pytest.mark.slow
def test_the_best_checkpoint_is_what_is_reported_and_saved(tiny: dict[str, Any]) -> None:
    tiny["train"] |= {"epochs": 6, "lr": 0.05}
    tiny["data"]["files"]["test"] = "validation.jsonl"
    result = run(validate(tiny))
    entry = result["runs"][0]
    by_step = {r["step"]: r["validation_accuracy"] for r in entry["curve"] if "validation_accuracy" in r}
    assert by_step[entry["best_step"]] == max(by_step.values())
    assert len(set(by_step.values())) > 1  # else there was nothing to choose
    assert entry["validation"]["accuracy"] == max(by_step.values()) == result["metrics"]["accuracy"]


@pytest.mark.slow
def test_the_reloaded_and_the_merged_model_predict_the_same(tiny: dict[str, Any]) -> None:
    tiny["train"]["epochs"] = 4
    tiny["check_saved"] = True  # in a new process
    result = run(validate(tiny))
    for name in ("reloaded", "merged"):
        assert result["saved"][name] == {"accuracy": result["metrics"]["accuracy"], "changed": 0}
    # The check is able to fail: a damaged head changes what is predicted.
    folder = Path(tiny["output"])
    path = folder / "psoft" / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    from safetensors.torch import save_file

    save_file(
        {name: -w if "classifier.weight" in name else w for name, w in weights.items()},
        path,
        metadata={"format": "pt"},
    )
    assert reload.score(folder, "psoft")["reloaded"]["changed"] > 0


@pytest.mark.slow
def test_the_classifier_reloads_through_peft_alone(tiny: dict[str, Any], tiny_model: Path) -> None:
    run(validate(tiny))
    adapter = Path(tiny["output"]) / "psoft" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    base, _ = models.load_classifier(str(tiny_model), "auto", ["0", "1"])
    model = models.restore(base, adapter, "psoft")
    saved = load_file(adapter / "adapter_model.safetensors")
    key = next(name for name in saved if name.endswith("classifier.weight"))
    merged = model.merge_and_unload()
    assert isinstance(merged, models.MeanPooledClassifier)
    assert torch.equal(merged.classifier.weight, saved[key])
    assert_exports(Path(tiny["output"]), "psoft", Path(tiny["output"]) / "exported")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["head", "full"])
def test_what_is_no_adapter_is_saved_and_reloaded_too(tiny: dict[str, Any], method: str) -> None:
    tiny["method"] = method
    tiny["train"]["lr"] = 1e-3
    result = run(validate(tiny))
    folder = Path(tiny["output"])
    total = sum(p.numel() for p in models.load_classifier(tiny["model"], "auto", ["0", "1"])[0].parameters())
    assert result["trainable_parameters"] == (66 if method == "head" else total)
    assert reload.score(folder, method)["reloaded"] == {
        "accuracy": result["metrics"]["accuracy"],
        "changed": 0,
    }


@pytest.mark.slow
def test_the_native_head_of_a_model_is_saved_whole(tiny: dict[str, Any]) -> None:
    tiny["pooling"] = "native"
    # The tiny BERT has a trained pooler, so only the classifier is new; without its pooler both are.
    _, head = models.load_classifier(tiny["model"], "native", ["0", "1"])
    assert head == ["classifier"]
    from transformers import AutoModel

    bare = Path(tiny["output"]).parent / "bare"
    AutoModel.from_pretrained(tiny["model"], add_pooling_layer=False).save_pretrained(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((Path(tiny["model"]) / name).read_bytes())
    tiny["model"] = str(bare)
    _, head = models.load_classifier(tiny["model"], "native", ["0", "1"])
    assert head == ["bert.pooler.dense", "classifier"]
    result = run(validate(tiny))
    assert reload.score(Path(tiny["output"]), "psoft")["merged"]["changed"] == 0
    assert result["runs"][0]["head_parameters"] == 66 + 32 * 32 + 32


@pytest.mark.slow
def test_several_learning_rates_choose_on_validation_only(tiny: dict[str, Any]) -> None:
    tiny["train"]["lr"] = [1e-7, 0.05]
    tiny["train"]["lr_head"] = None
    tiny["train"]["epochs"] = 8
    result = run(validate(tiny))
    slow, fast = result["runs"]
    assert (slow["lr"], fast["lr"]) == (1e-7, 0.05)
    assert (result["rows"][0]["lr"], result["rows"][0]["lr_at_border"]) == (0.05, False)
    assert fast["validation"]["accuracy"] > slow["validation"]["accuracy"]
    assert result["metrics"] == fast["test"]
    trained = {path.parent.parent.name for path in Path(tiny["output"]).rglob("adapter_config.json")}
    assert trained == {"psoft-lr=1e-07", "psoft-lr=0.05"}


def test_learning_rates_without_validation_are_refused(tiny: dict[str, Any]) -> None:
    tiny["train"]["lr"] = [1e-3, 1e-2]
    tiny["data"]["files"].pop("validation")
    with pytest.raises(RecipeError, match=r"chosen on a validation set, and there is none: give one, or one train.lr"):
        run(validate(tiny))


@pytest.mark.slow
def test_training_without_validation_reports_the_last_step(tiny: dict[str, Any]) -> None:
    tiny["data"]["files"].pop("validation")
    tiny["train"] |= {"max_steps": 3, "epochs": 1}
    entry = run(validate(tiny))["runs"][0]
    assert (entry["best_step"], entry["validation"]) == (3, None)


@pytest.mark.slow
def test_head_and_adapter_have_their_own_learning_rates(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[float, list[tuple[float, float]]] = {}

    class Look(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            names = {id(p): n for n, p in model.named_parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    found[names[id(parameter)]] = (group["initial_lr"], group["weight_decay"])

    train_with(Look(), monkeypatch)
    tiny["train"] |= {"weight_decay": 0.1, "max_steps": 1}
    run(validate(tiny))
    heads = {name: rates for name, rates in found.items() if "classifier" in name}
    assert {rate for rate, _ in heads.values()} == {0.01}
    assert {rate for name, (rate, _) in found.items() if name not in heads} == {0.02}
    assert {name.rpartition(".")[2]: decay for name, (_, decay) in heads.items()} == {
        "weight": 0.1,
        "bias": 0.0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    tiny["train"] |= {"lr": 0.05, "group_by_length": grouped, "select_best": False}
    whole = run(validate({**tiny, "output": str(tmp_path / "whole")}))
    for step in (4, 8, 11):
        folder = tmp_path / str(step)
        recipe = validate({**tiny, "output": str(folder)})
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda model: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                run(recipe)
        assert progress.last_checkpoint(folder / "psoft") == folder / "psoft" / f"checkpoint-{step}"
        assert not (folder / RESULT).exists()
        seen: list[int] = []
        with monkeypatch.context() as patch:
            at_step(patch, step + 1, lambda model, step=step, seen=seen: seen.append(step + 1))
            resumed = run(recipe)
        assert seen == [step + 1]  # it went on, and did not start again
        assert resumed["metrics"] == whole["metrics"]
        assert [r["step"] for r in resumed["runs"][0]["curve"]] == [r["step"] for r in whole["runs"][0]["curve"]]
        first, second = (
            load_file(f / "psoft" / "adapter" / "adapter_model.safetensors") for f in (folder, tmp_path / "whole")
        )
        for name, weights in second.items():
            torch.testing.assert_close(first[name], weights, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's files."""
    folder = tmp_path_factory.mktemp("stored")
    save_file({"weight": torch.zeros(3)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"values": torch.zeros(3)}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize("halved", [True, False])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_checkpoint_of_which_a_part_is_missing_is_passed_over(
    name: str, halved: bool, stored: Path, tmp_path: Path
) -> None:
    """Trainer goes on from what it finds, and begins the rest anew."""
    for step in (2, 4):
        shutil.copytree(stored, tmp_path / f"checkpoint-{step}")
    assert progress.last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-6").mkdir()
    file = tmp_path / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) if halved else file.unlink()
    assert progress.last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert progress.last_checkpoint(tmp_path / "absent") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "by",
    [
        {"eval_steps": None},
        pytest.param(
            {"eval_steps": 4},
            marks=pytest.mark.xfail(
                Version(transformers.__version__) < Version("5.23"),
                reason="5.6 takes the rest of an epoch in another order; those between are not known",
                strict=False,
            ),
        ),
    ],
)
def test_a_run_killed_between_points_of_its_curve_leaves_the_same_curve(
    by: dict[str, Any], tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["train"] |= {"batch_size": 5, "epochs": 3, **by}
    whole = run(validate({**tiny, "output": str(tmp_path / "whole")}))
    killed = validate({**tiny, "output": str(tmp_path / "killed")})

    def kill(model: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        at_step(patch, 35, kill)  # Trainer logs every third step, and the last checkpoint is of another
        with pytest.raises(RuntimeError, match="killed"):
            run(killed)
    assert run(killed)["runs"][0]["curve"] == whole["runs"][0]["curve"]


def test_a_second_interrupt_stops_at_once(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(model: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run(validate(tiny))
    assert progress.last_checkpoint(Path(tiny["output"]) / "psoft") is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_background_job_goes_on_ignoring_ctrl_c(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tiny["train"]["max_steps"] = 3
    at_step(monkeypatch, 2, lambda model: signal.raise_signal(signal.SIGINT))
    assert run(validate(tiny))["runs"][0]["best_step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_nan_stops_and_keeps_the_last_good_checkpoint(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(model: Any) -> None:
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    at_step(monkeypatch, 11, poison)
    with pytest.raises(progress.TrainingDiverged, match=r"training loss is nan at step 11: lower train\.lr") as caught:
        run(validate(tiny))
    kept = Path(tiny["output"]) / "psoft" / "checkpoint-8"
    assert str(kept) in str(caught.value)
    weights = load_file(kept / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not (Path(tiny["output"]) / RESULT).exists()


@pytest.mark.slow
def test_nan_after_the_last_step_before_a_save_is_not_saved(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 8:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    train_with(Poison(), monkeypatch)
    with pytest.raises(progress.TrainingDiverged, match=r"validation loss is nan at step 8.*no checkpoint yet"):
        run(validate(tiny))


def test_a_finished_experiment_is_printed_and_not_run_again(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["train"]["max_steps"] = 2
    result = run(validate(tiny))
    monkeypatch.setattr(loop, "train", None)
    before = (Path(tiny["output"]) / RESULT).read_bytes()
    with caplog.at_level("INFO", "isotune"):
        assert run(validate(tiny)) == result
    assert f"already finished; remove {tiny['output']} to run it again" in caplog.messages
    assert "PSOFT r=4" in table(result)
    assert (Path(tiny["output"]) / RESULT).read_bytes() == before


@pytest.mark.slow
def test_a_training_that_an_earlier_release_began_goes_on(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["train"] |= {"max_steps": 2, "lr": [0.02, 0.03]}
    result = run(validate(tiny))
    folder = Path(tiny["output"])
    (folder / RESULT).unlink()
    for path in folder.glob("*/run.json"):  # which stored what differs from run to run, and no more
        record = read_json(path)
        for key in ("format", "recipe", "task", "label", "phase", "model", "seed", "settings", "metric", "versions"):
            del record[key]
        write_json(path, {**record, "folder": path.parent.name})
    monkeypatch.setattr(loop, "train", None)
    again = train(validate(tiny))
    assert again["rows"] == result["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[]", '{"test": 1}', "[" * 9999])
def test_a_damaged_record_is_one_line_that_names_the_file(tiny: dict[str, Any], text: str) -> None:
    tiny["train"]["max_steps"] = 1
    result = run(validate(tiny))
    folder = Path(tiny["output"])
    (folder / RESULT).write_text(text)  # which is only what the records come to
    assert run(validate(tiny)) == result
    path = folder / "psoft" / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="cannot read") as caught:
        run(validate(tiny))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_another_experiment_is_not_mixed_into_a_folder(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train"]["max_steps"] = 1
    run(validate(tiny))
    with pytest.raises(RecipeError, match=r"another experiment \(method.r is 4 there and 2 here\)"):
        run(validate({**tiny, "method": {"name": "psoft", "r": 2}}))
    claimed = tmp_path / "claimed"
    with pytest.raises(ValueError, match="absent"):  # whose claim is all that is left
        run(validate({**tiny, "model": str(tmp_path / "absent"), "output": str(claimed)}))
    assert [path.name for path in claimed.iterdir()] == ["experiment.json"]
    assert run(validate({**tiny, "output": str(claimed)}))["rows"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(RecipeError, match="holds something else"):
        run(validate({**tiny, "output": str(tmp_path / "full")}))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("package:no_such_package", "no_such_package.* is not installed"),
        ("package:json", "carries no model"),
        ("/no/such/folder", "There is no folder"),
        ("no-such-model", "cannot load the tokeniser of no-such-model"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(tiny: dict[str, Any], model: str, said: str) -> None:
    with pytest.raises(models.ModelError, match=said) as caught:
        run(validate({**tiny, "model": model}))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_line(tiny: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(models.ModelError, match=r"cannot load the model .*damaged or not complete .*copy or download"):
        run(validate({**tiny, "model": str(weights.parent)}))


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match=r"there is no config\.json"):
        models.locate(str(tmp_path))


def test_mean_pooling_leaves_padding_out(tiny_model: Path) -> None:
    model, head = models.load_classifier(str(tiny_model), "auto", ["a", "b", "c"])
    assert head == ["classifier"]
    model.eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    alone = model(ids, torch.ones_like(ids)).logits
    padded = torch.tensor([[2, 7, 9, 3, 0, 0, 0]])
    torch.testing.assert_close(model(padded, (padded != 0).long()).logits, alone, rtol=1e-5, atol=1e-6)
    assert alone.shape == (1, 3)


@pytest.mark.slow
def test_the_head_on_stored_embeddings_is_the_head_on_the_model(tiny: dict[str, Any]) -> None:
    tiny["method"] = "head"
    tiny["train"]["max_steps"] = 2
    result = run(validate(tiny))
    assert reload.score(Path(tiny["output"]), "head")["reloaded"]["changed"] == 0
    assert 0 <= result["runs"][0]["untrained"]["accuracy"] <= 1


@pytest.mark.slow
def test_start_from_head_starts_where_the_head_ended(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny["baselines"] = [{"name": "head", "train": {"lr": 0.05, "epochs": 25}}]
    tiny["train"] |= {"start_from_head": True, "lr": 1e-9, "lr_head": 1e-9, "max_steps": 1}
    tiny["baselines"][0]["train"] |= {"lr_head": None, "max_steps": 150}
    result = run(validate(tiny))
    head, psoft = result["runs"]
    assert head["test"] == psoft["test"]
    assert head["test"] != head["untrained"]


def test_start_from_head_needs_a_head_trained_before(tiny: dict[str, Any]) -> None:
    tiny["baselines"] = [{"name": "lora", "r": 2, "train": {"start_from_head": True}}, {"name": "head"}]
    with pytest.raises(RecipeError, match="needs the method head to be trained before lora"):
        run(validate(tiny))


def test_length_groups_are_a_fixed_permutation_with_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 1003).tolist()
    sampler = encoded.LengthGrouped(lengths, 8, seed=3, grouped=True)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert order != list(sampler)

    def padded(indices: list[int]) -> int:
        return sum(8 * max(lengths[i] for i in indices[at : at + 8]) for at in range(0, 1003, 8))

    assert padded(order) < 1.1 * sum(lengths)
    assert padded(list(encoded.LengthGrouped(lengths, 8, 3, False))) > 1.5 * sum(lengths)


def test_scores_agree_with_their_definitions() -> None:
    logits = np.array([[2, 1], [0, 1], [0, 1], [3, 0]])
    found = encoded.class_scores(encoded.likeliest(logits), np.array([0, 1, 0, 0]))
    assert found["accuracy"] == 0.75
    assert found["matthews_correlation"] == pytest.approx((1 * 2 - 1 * 0) / (2 * 1 * 3 * 2) ** 0.5)
    numbers, labels = np.array([0.1, 0.5, 0.2, 3.0]), np.array([0.0, 1.0, 2.0, 4.0])
    found = encoded.regression_scores(numbers, labels)
    assert found["pearson"] == pytest.approx(np.corrcoef(numbers, labels)[0, 1])
    assert found["spearman"] == pytest.approx(0.8)
    assert encoded.regression_scores([1.0, 1.0], [0.0, 5.0]) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.slow
def test_the_chart_is_a_picture_of_the_scores(tiny: dict[str, Any]) -> None:
    import matplotlib.image

    tiny["train"]["max_steps"] = 1
    tiny["chart"] = True
    run(validate(tiny))
    picture = matplotlib.image.imread(Path(tiny["output"]) / "chart.png")
    assert picture.shape[1] == 1280
    assert picture[..., :3].std() > 0.05  # not a blank page


@pytest.mark.slow
def test_training_says_nothing_that_is_not_ours(tiny: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    tiny["train"]["epochs"] = 2
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    command = [
        sys.executable,
        "-c",
        "from isotune_cli import main; main()",
        "train",
        str(tmp_path / "tiny.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    # transformers imports torchao and bitsandbytes where they are installed, which say what does not fit this machine.
    others = ("torchao", "torch/utils/_pytree.py", "kernels-community")
    said = [line for line in said if not any(other in line for other in others)]
    ours = ("24 test examples; 1 run, 0 of them done", "run 1 of 1: psoft lr 0.02 seed 0, starting", "100% 16/16")
    assert all(any(one in line for line in said) for one in ours), said
    assert all(line.startswith(("psoft lr", "run 1", "64 training", "principal")) for line in said), said
    assert "Warning" not in done.stdout + done.stderr
    assert "PSOFT r=4" in done.stdout


@pytest.mark.parametrize(
    ("best", "kept"), [(None, {"checkpoint-8", "checkpoint-12"}), (4, {"checkpoint-4", "checkpoint-12"})]
)
def test_checkpoints_are_kept_by_their_steps(best: int | None, kept: set[str], tmp_path: Path) -> None:
    """Also where a clock was set back, by which Trainer would remove the one that it has just written."""
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (1e9 - step, 1e9 - step))
    (tmp_path / "checkpoint-mine").mkdir()
    state = SimpleNamespace(best_model_checkpoint=best and str(tmp_path / f"checkpoint-{best}"))
    loop.Loop._keep_two(SimpleNamespace(state=state), tmp_path / "checkpoint-12")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "checkpoint-mine"}


@pytest.mark.slow
def test_texts_beyond_a_models_positions_are_one_line(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train"]["max_length"] = 100
    run(validate(tiny))  # no text is that long
    folder = shutil.copytree(tiny["data"]["path"], tmp_path / "data")
    with (folder / "test.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "good " * 40, "label": 1}))
    tiny["data"]["path"] = str(folder)
    tiny["output"] += "-long"
    said = r"has 32 positions, and fails at a text of 42 tokens \(.*\); set train.max_length=32, or 30 where"
    with pytest.raises(models.ModelError, match=said):
        run(validate(tiny))
    tiny["train"]["max_length"] = 32
    run(validate(tiny))


@pytest.mark.parametrize("kind", ["Bart", "Roberta"])
def test_positions_are_tried_with_a_text_that_is_there(kind: str) -> None:
    """BART's classifiers ask for the end of a text; RoBERTa counts no padding, and reserves two positions."""
    sizes = {"vocab_size": 21, "hidden_size": 32, "d_model": 32, "num_attention_heads": 2, "intermediate_size": 48}
    small = {
        "num_hidden_layers": 1,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, **small, max_position_embeddings=34)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    fits = 34 if kind == "Bart" else 32
    models.check_length(model, kind, [0, *[5] * (fits - 2), config.eos_token_id])
    with pytest.raises(models.ModelError, match=f"{kind} has 34 positions.*34, or 32 where"):
        models.check_length(model, kind, [0, *[5] * (fits + 6), config.eos_token_id])


def test_a_loss_is_the_part_in_that_of_an_update() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    outputs, whole = SimpleNamespace(logits=logits), torch.nn.functional.cross_entropy(logits, labels)
    assert mean_loss(outputs, labels) == whole
    # As Trainer gives the number of 12 examples: of one process, and for nn.DataParallel on two devices.
    for number, by in ((torch.tensor(12), 1), (torch.tensor([[12], [12]]), 2), (12, 1)):
        torch.testing.assert_close(by * mean_loss(outputs, labels, number), whole / 2)


def without_dropout(model: Path, folder: Path) -> str:
    copied = shutil.copytree(model, folder)
    config = read_json(copied / "config.json")
    write_json(copied / "config.json", config | {name: 0.0 for name in config if "dropout" in name})
    return str(copied)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("task", ["text-classification", "text-regression"])
def test_a_batch_in_parts_is_the_batch(tiny: dict[str, Any], tmp_path: Path, pooling: str, task: str) -> None:
    """Classifiers of transformers take any keyword, and do not divide by the number of examples that Trainer gives."""
    tiny |= {"model": without_dropout(Path(tiny["model"]), tmp_path / "model"), "pooling": pooling, "task": task}
    tiny["metric"] = "pearson" if task == "text-regression" else "accuracy"
    tiny["data"]["max_train"] = 61  # the last batch is a short one, of parts of unequal size
    whole = run(validate(tiny))["runs"][0]["curve"]
    tiny["train"]["gradient_accumulation"] = 4
    parts = run(validate({**tiny, "output": str(tmp_path / "parts")}))["runs"][0]["curve"]
    assert len(whole) == len(parts) > 4
    for one, other in zip(whole, parts, strict=True):
        del one["epoch"], other["epoch"]  # Trainer counts the batches of which an update is made
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
