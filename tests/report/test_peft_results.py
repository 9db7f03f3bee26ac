"""Results of PEFT's own benchmark in our report: in one table with those of isotune that its run.py wrote, marked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from comparisons import METHODS, write_comparison
from isotune.report.finding import finding
from isotune.report.page import render
from isotune.report.reading import comparisons
from isotune.report.table import comma_separated, latex, markdown
from scripts import ROOT

PUBLISHED = ROOT / "benchmarks" / "results" / "peft"


def result(name: str, kind: str | None, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """What PEFT's run.py writes of a training, with made-up numbers."""
    metrics: list[dict[str, float]] = [
        {"step": step, "valid accuracy": 0.3 + step / 100, "train loss": 1 / step} for step in (5, 10)
    ]
    if accuracy is not None:
        metrics.append({"step": 10, "test accuracy": accuracy, "train loss": 0.1, "forgetting": 0.04})
    training = {"model_id": "org/Tiny-1B", "seed": 0, "max_steps": 10, "batch_size": 4, "dtype": "bfloat16"}
    return {
        "run_info": {
            "experiment_name": name,
            "created_at": changes.get("created_at", "2026-11-01T10:00:00+00:00"),
            "train_config": {
                **training,
                "optimizer_kwargs": {"lr": changes.get("lr", 1e-4), "weight_decay": 0.1},
                "seed": changes.get("seed", 0),
            },
            "peft_config": None if kind is None else {"peft_type": kind, "r": 8, **changes.get("config", {})},
            "error_msg": changes.get("error", ""),
        },
        "train_info": {
            "accelerator_memory_max": 2**30,
            "train_time": 100.5,
            "file_size": changes.get("file_size", 2**20),
            "num_trainable_params": 1000,
            "status": "success" if accuracy is not None else "canceled",
            "metrics": metrics,
        },
        "meta_info": {
            "dataset_info": {"gsm8k": {"sha": changes.get("sha", "abc")}},
            "package_info": {"peft-version": "0.21.2", "torch-version": "2.13.0"},
            "system_info": {"system": "Linux", "accelerator": changes.get("gpu", "NVIDIA L40S")},
        },
    }


def write(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(results):
        name = one["run_info"]["experiment_name"].replace("/", "--")
        (folder / f"{name}--{number}.json").write_text(json.dumps(one))
    return folder


def test_ours_and_pefts_stand_in_one_table_and_are_told_apart(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "results",
        result("isotune-psoft/tiny-1B-rank8", "ISOTUNE_PSOFT", 0.5, lr=8e-4, config={"psoft_mag_a": True}),
        result("psoft/tiny-1b-default", "PSOFT", 0.45),
        result("lora/tiny-1B-dora", "LORA", 0.4, config={"use_dora": True}),
        result("lily/tiny-1B-rank8", "LILY", 0.52, gpu="NVIDIA H100"),
        result("full-finetuning/tiny-1B-lr", None, 0.3, created_at="2026-07-09", file_size=99_999_999),
    )
    (found,) = comparisons([folder])
    titles = {variant.title: variant for variant in found.variants}
    assert set(titles) == {
        "PSOFT rank8",
        "PSOFT default (PEFT)",
        "DoRA dora (PEFT)",
        "LILY rank8 (PEFT)",
        "full fine-tuning lr (PEFT)",
    }
    ours = titles["PSOFT rank8"]
    assert (ours.mean, ours.lr, ours.tried) == (0.5, 8e-4, [])
    assert ours.average("peak_memory_bytes") == 2**30
    assert ours.average("train_seconds") == 100.5
    assert ours.average("forgetting") == 0.04
    assert [point["validation_accuracy"] for point in ours.runs[0].curve] == [0.35, 0.4]
    full = titles["full fine-tuning lr (PEFT)"]
    assert full.average("forgetting") is None  # measured otherwise then
    assert full.average("adapter_bytes") is None  # PEFT's sign that it could not save
    notes = " ".join(found.notes)
    assert "The GPU differs" in notes
    assert "NVIDIA H100 for LILY rank8 (PEFT)" in notes
    assert "before 2026-07-10 is left out" in notes
    assert "The batch size differs" not in notes
    assert (found.model, found.data) == ("org/Tiny-1B", {"test": 1319})
    said = finding(found)
    assert said is not None
    assert said.sentence.startswith("LILY rank8 (PEFT) has the highest accuracy")  # an adapter, though not known here
    for text in (markdown([found]), latex([found]), comma_separated([found]), render([found])):
        assert "LILY rank8 (PEFT)" in text or "lily/tiny-1B-rank8" in text


def test_seeds_of_an_experiment_stand_together_and_a_rate_apart(tmp_path: Path) -> None:
    name, kind = "isotune-oft/tiny-1B-block8", "ISOTUNE_OFT"
    folder = write(
        tmp_path / "temporary_results",
        result(name, kind, 0.1),
        result(name, kind, 0.4, created_at="2026-11-02"),  # the same again: the last counts
        result(name, kind, 0.5, seed=1),
        result(name, kind, 0.6, lr=8e-4, sha=None),
    )
    (found,) = comparisons([folder])
    scores = {variant.title: variant.scores for variant in found.variants}
    assert scores == {"OFT block8 at 0.0001": [0.4, 0.5], "OFT block8 at 0.0008": [0.6]}
    assert found.data == {}  # of local data it is not known how many there are


def test_what_failed_is_told(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "cancelled_results",
        result("hra/tiny-1B-default", "HRA", None, error="CUDA out of memory.\nTried more"),
        result("oft/tiny-1B-default", "OFT", 0.4),
        result("oft/tiny-1B-default", "OFT", None, seed=1),
        result("oft/other-default", "OFT", 0.1, config={"oft_block_size": 4}),
    )
    (found,) = comparisons([folder])
    assert "OFT default (PEFT) failed: its status is canceled" in found.notes  # one of two seeds
    assert "HRA default (PEFT) failed: CUDA out of memory." in found.notes
    assert [variant.title for variant in found.scored] == ["OFT other-default (PEFT)", "OFT default (PEFT)"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the records of the repository")
def test_the_published_results_stand_beside_a_users_own_with_their_source(tmp_path: Path) -> None:
    images, words = comparisons([PUBLISHED])
    assert (images.metric, words.metric) == ("dino_similarity", "accuracy")
    assert len(words.scored) == 16
    assert "huggingface/peft, method_comparison/MetaMathQA/results, commit 5d602fdbf" in words.notes[0]
    assert "Forgetting is the change of the images of other prompts (PEFT's drift)." in images.notes
    own = result("lora/llama-3.2-3B-rank32", "LORA", 0.49, gpu="NVIDIA H100")
    own["run_info"]["train_config"]["model_id"] = "meta-llama/Llama-3.2-3B"
    ours = write_comparison(tmp_path / "ours", methods={"head": METHODS["head"]})
    both = comparisons([write(tmp_path / "own", own), ours, PUBLISHED / "metamathqa.json"])
    assert [len(one.variants) for one in both] == [17, 1]
    scores = {variant.title: variant.mean for variant in both[0].variants}
    assert scores["LoRA rank32 (PEFT)"] == 0.49
    assert scores["LoRA rank32 (PEFT, published)"] == 0.478
    assert both[0].variants[0].lr is not None


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (("run_info",), [], "run_info should be an object, not []"),
        (("run_info", "experiment_name"), "", "run_info.experiment_name should be METHOD/NAME, not ''"),
        (("run_info", "train_config", "seed"), "0", "seed should be a number without a fraction, not '0'"),
        (("train_info", "metrics"), {}, "train_info.metrics should be a list, not {}"),
        (("train_info", "train_time"), "long", "train_info.train_time should be a number, not 'long'"),
        (("meta_info", "system_info"), 3, "meta_info.system_info should be an object, not 3"),
        (("train_info",), None, "train_info should be an object, not None"),
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, at: tuple[str, ...], value: Any, said: str) -> None:
    content = copy.deepcopy(result("oft/tiny-1B-default", "OFT", 0.4))
    place = content
    for name in at[:-1]:
        place = place[name]
    place[at[-1]] = value
    path = tmp_path / "oft--tiny-1B-default.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot read .*oft--tiny-1B-default\.json: ") as caught:
        comparisons([tmp_path])
    assert str(caught.value).endswith(said)


def test_what_is_no_json_and_a_condensed_result_without_a_name_are_named(tmp_path: Path) -> None:
    path = tmp_path / "oft--tiny-1B-default.json"
    path.write_text('{"run_info": {')
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match=r"cannot read .*oft--tiny-1B-default\.json: "):
            comparisons([given])
    source = {"repository": "huggingface/peft", "path": "results", "commit": "abc"}
    path.write_text(json.dumps({"source": source, "shared": {"run_info": 3}, "results": [{"run_info": {}}]}))
    with pytest.raises(ValueError, match=r"default\.json, result 1: run_info\.experiment_name should be there"):
        comparisons([tmp_path])


def test_a_folder_without_either_is_refused_as_before(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results"):
        comparisons([tmp_path])
