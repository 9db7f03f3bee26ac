"""Both exports of a trained run, loaded by a process that cannot import isotune, beside what was trained."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import isotune_cli as cli
from elsewhere import asked_elsewhere
from isotune.experiments import models, tasks
from isotune.experiments.files import read_object
from isotune.experiments.recipe import Recipe
from isotune.files.base_model import quiet


def assert_exports(output: Path, folder: str, place: Path) -> None:
    """Export the adapter of a finished run both ways; each computes what was trained, without isotune.

    Args:
        output: of the run.
        folder: of the method in it.
        place: a new folder to write to.
    """
    place.mkdir()
    for kind in ("lora", "merged"):
        done = CliRunner().invoke(
            cli.app,
            ["export", str(output / folder / "adapter"), "--to", kind, "-o", str(place / kind)],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
    mask = os.umask(0)
    os.umask(mask)
    for file in (*place.rglob("*.*"), *(output / folder / "adapter").glob("*.*")):
        assert file.is_dir() or stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file
    recipe = Recipe.model_validate(read_object(output / "experiment.json")["recipe"])
    task = tasks.make(recipe)
    with quiet():
        model = models.restore(task.build()[0], output / folder / "adapter", recipe.method.name)
    batch: dict[str, Any] = {k: v for k, v in task.training_batch().items() if k != "labels"}
    with torch.no_grad():
        expected: Tensor = model(**batch).logits
    save_file({**batch, "expected": expected.contiguous()}, place / "batch.safetensors")
    loader = {
        "text": "AutoModelForSequenceClassification",
        "image": "AutoModelForImageClassification",
    }.get(recipe.task.split("-")[0], "AutoModelForCausalLM")
    base = str(json.loads((output / folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"])
    labels = task.about().get("labels", [])
    errors = asked_elsewhere(place=str(place), base=base, loader=loader, labels=labels)
    assert len(errors) == 2
    assert max(errors) < 1e-4, errors
