"""A dry run: what it says is what a training then has, and it leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from isotune.experiments.loading import load
from isotune.experiments.preview import steps
from isotune.experiments.recipe import Train, validate
from isotune_cli import app
from trainings import run

runner = CliRunner()


@pytest.fixture
def recipe(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """With a head before, and as a file."""
    tiny["baselines"] = [{"name": "head", "train": {"max_steps": 3}}]
    tiny["train"] |= {"gradient_accumulation": 2, "epochs": 1.6}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.mark.slow
def test_a_dry_run_says_what_the_training_then_has(recipe: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    done = runner.invoke(app, ["train", str(recipe), "method.r=2", "--dry-run", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    found = json.loads(done.stdout)
    result = run(load(str(recipe), ["method.r=2"]))
    for said, trained in zip(found["methods"], result["runs"], strict=True):
        assert said["label"] == trained["label"]
        assert said["steps"] == trained["curve"][-1]["step"]
        assert said["trainable_parameters"] == trained["trainable_parameters"]
        assert said["memory_bytes"] == sum(said["memory"].values())
    head, psoft = (said["memory"]["kept for backward"] for said in found["methods"])
    assert 0 < head < psoft
    assert (found["runs"], found["data"]["train"]) == (2, 64)
    assert validate(found["recipe"]).model_dump() == load(str(recipe), ["method.r=2"]).model_dump()


@pytest.mark.slow
def test_the_memory_is_that_under_autocast(recipe: Path) -> None:
    kept = []
    for given in ("train.autocast=false", "train.autocast=true"):
        done = runner.invoke(app, ["train", str(recipe), given, "--dry-run", "--json"], catch_exceptions=False)
        kept.append([row["memory"]["kept for backward"] for row in json.loads(done.stdout)["methods"]])
    assert all(one != other for one, other in zip(*kept, strict=True))


def test_of_several_processes_one_speaks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    done = runner.invoke(app, ["train", str(recipe), "--dry-run"], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, "")


def test_for_people_it_is_a_recipe_and_a_table(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--methods", "psoft:r=2,full", "--lr-search", "2", "-o", str(tmp_path / "out"), "--dry-run"]
    done = runner.invoke(app, ["compare", str(recipe), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "out").exists()
    text, table = done.stdout.split("\n\n")[:2]
    assert validate(yaml.safe_load(text)).train.gradient_accumulation == 2
    lines = [line.split() for line in table.splitlines()]
    assert [line[0] for line in lines] == ["method", "psoft:r=2", "full"]
    assert all(line[-1] in ("KiB", "MiB") for line in lines[1:])
    assert f"8 runs; results would be in {tmp_path / 'out'}" in done.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"epochs": 2, "batch_size": 8}, 26),
        ({"epochs": 1.5, "batch_size": 8}, 20),
        ({"epochs": 2, "batch_size": 8, "gradient_accumulation": 4}, 26),
        ({"epochs": 2, "batch_size": 8, "max_steps": 5}, 5),
        ({"epochs": 1, "batch_size": 200}, 1),
    ],
)
def test_steps_are_counted_as_the_trainer_does(given: dict[str, Any], expected: int) -> None:
    assert steps(Train.model_validate(given), 100) == expected
