"""Scores a saved run in a fresh process: `python -m isotune.experiments.reload OUTPUT FOLDER`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from isotune.experiments import tasks
from isotune.experiments.execute import PREDICTIONS, RELOADED
from isotune.experiments.files import read_json, write_json
from isotune.experiments.recipe import Recipe
from isotune.files.base_model import quiet


def _differs(predicted: Any, expected: Any) -> bool:
    """Whether two predictions are not the same: numbers to what rounding may do, all else exactly."""
    if isinstance(expected, float):
        return not math.isclose(predicted, expected, rel_tol=1e-3, abs_tol=1e-4)
    return bool(predicted != expected)


def score(output: Path, folder: str) -> dict[str, Any]:
    """Reload the run in `output / folder` and score it on the test set, as it is and merged.

    `changed` counts test examples whose prediction differs from that of the model in memory after training.
    """
    import torch

    from isotune.experiments import models

    recipe = Recipe.model_validate(read_json(output / "experiment.json")["recipe"])
    task = tasks.make(recipe)
    expected = read_json(output / folder / PREDICTIONS)
    with quiet():
        torch.manual_seed(0)
        model = models.restore(task.build()[0], output / folder / "adapter", recipe.method.name)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = {"reloaded": task.predict(model)}
        if hasattr(model, "merge_and_unload"):
            found["merged"] = task.predict(model.merge_and_unload().eval())
    return {
        name: {
            recipe.metric: task.score(predicted)[recipe.metric],
            "changed": sum(_differs(p, e) for p, e in zip(predicted, expected, strict=True)),
        }
        for name, predicted in found.items()
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[1]) / sys.argv[2] / RELOADED, score(Path(sys.argv[1]), sys.argv[2]))
