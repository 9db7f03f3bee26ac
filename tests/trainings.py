"""A training, and all that its files say of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from isotune.experiments import loop
from isotune.experiments.files import read_json
from isotune.experiments.recipe import Recipe
from isotune.experiments.records import RESULT
from isotune.experiments.train import train


def run(recipe: Recipe) -> dict[str, Any]:
    """Train, and return the result with `runs`, the record of each, and the `metrics` of the last at its best rate."""
    return {**train(recipe), **found_in(Path(recipe.output or ""))}


def found_in(folder: Path) -> dict[str, Any]:
    """What a finished training has left in its folder, as `run` returns it."""
    result = read_json(folder / RESULT)
    labels = [row["label"] for row in result["rows"]]
    runs = sorted(map(read_json, folder.glob("*/run.json")), key=lambda r: (labels.index(r["label"]), r["lr"]))
    best = next(r for r in runs if (r["label"], r["lr"]) == (labels[-1], result["rows"][-1]["lr"]))
    sizes = {name: best[name] for name in ("trainable_parameters", "adapter_bytes")}
    return {**result, **sizes, "runs": runs, "metrics": best["test"]}


def train_with(callback: TrainerCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runner's trainings call one more of transformers' callbacks."""
    original = loop.train

    def train(model: Any, task: Any, run: Any, head: Any, callbacks: Sequence[TrainerCallback] = ()) -> loop.Outcome:
        return original(model, task, run, head, [*callbacks, callback])

    monkeypatch.setattr(loop, "train", train)
