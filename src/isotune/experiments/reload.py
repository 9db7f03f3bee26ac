"""Scores a saved run in a fresh process: `python -m isotune.experiments.reload OUTPUT FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from isotune.base_model import quiet
from isotune.experiments import data, models
from isotune.experiments.files import read_json, write_json
from isotune.experiments.recipe import Recipe


def predict(model: Any, encoded: dict[str, Any], batch_size: int) -> list[int]:
    """The class predicted for each test row, in the rows' order."""
    import torch

    device = next(model.parameters()).device
    found: list[int] = []
    with torch.no_grad():
        for start in range(0, len(encoded["test"]), batch_size):
            batch = encoded["collate"](encoded["test"][start : start + batch_size])
            batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            found += model(**batch).logits.argmax(-1).tolist()
    return found


def score(output: Path, folder: str) -> dict[str, Any]:
    """Reload the run in `output / folder` and score it on the test set, as it is and merged.

    `changed` counts test examples whose prediction differs from that of the model in memory after training.
    """
    import torch

    from isotune.experiments.run import encode

    recipe = Recipe.model_validate(read_json(output / "experiment.json")["recipe"])
    examples = data.load(recipe.data)
    encoded = encode(examples, models.tokenizer_for(recipe.model), recipe.train.max_length)
    expected = read_json(output / folder / "predictions.json")
    labels = [row["labels"] for row in encoded["test"]]
    with quiet():
        model = models.reload(
            recipe.model, recipe.pooling, examples.labels, output / folder / "adapter", recipe.method.name
        )
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = {"reloaded": predict(model, encoded, recipe.train.eval_batch_size)}
        if hasattr(model, "merge_and_unload"):
            found["merged"] = predict(model.merge_and_unload().eval(), encoded, recipe.train.eval_batch_size)
    return {
        name: {
            "accuracy": sum(p == t for p, t in zip(predicted, labels, strict=True)) / len(labels),
            "changed": sum(p != e for p, e in zip(predicted, expected, strict=True)),
        }
        for name, predicted in found.items()
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[1]) / sys.argv[2] / "reloaded.json", score(Path(sys.argv[1]), sys.argv[2]))
