"""One run of a comparison: what it is, and how it is carried out wherever an engine puts it."""

from __future__ import annotations

import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isotune.experiments.recipe import Recipe

FORMAT = 1


@dataclass(frozen=True)
class Spec:
    """A run, complete in itself: an engine needs nothing else to carry it out.

    `recipe` is the comparison's recipe with this run's method, rate and seed; `folder` holds its checkpoints while it
    runs; `record` is where its record belongs; `start_from` is the folder of a trained head, for `start_from_head`.
    """

    name: str
    label: str
    phase: str
    lr: float
    seed: int
    recipe: dict[str, Any]
    fingerprint: str
    folder: str
    record: str
    start_from: str | None
    threads: int

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells this run from the others of its comparison."""
        return self.label, self.lr, self.seed

    @property
    def title(self) -> str:
        """The run in a line for people."""
        return f"{self.label} lr {self.lr:g} seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        """What a record says of the run before anything is trained."""
        recipe = Recipe.model_validate(self.recipe)
        return {
            "format": FORMAT,
            "recipe": self.name,
            "task": recipe.task,
            "label": self.label,
            "method": {"name": recipe.method.name, **recipe.method.options},
            "phase": self.phase,
            "model": recipe.model,
            "seed": self.seed,
            "lr": self.lr,
            "settings": recipe.training(recipe.method).model_dump(mode="json"),
            "metric": recipe.metric,
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON."""
        return asdict(self)


def execute(spec: Spec) -> dict[str, Any]:
    """Carry out a run, from its last checkpoint where there is one, and return its record.

    Raises what training raises; the checkpoints are then left where they are.
    """
    import torch

    from isotune.experiments import run, tasks

    torch.set_num_threads(spec.threads)
    recipe = Recipe.model_validate(spec.recipe)
    task = tasks.make(recipe)
    if task.fingerprint() != spec.fingerprint:
        raise ValueError(
            "the data are not those that the comparison began with; its results would be about two different tasks"
        )
    folder = Path(spec.folder)
    start_from = Path(spec.start_from) if spec.start_from else None
    entry = run.train_one(recipe, recipe.method, spec.lr, task, folder, start_from)
    return {
        **spec.identity(),
        "versions": run.versions(),
        "hardware": run.hardware(),
        "data": {**task.sizes, **task.about(), "fingerprint": spec.fingerprint},
        **{key: value for key, value in entry.items() if key != "folder"},
    }


def attempt(spec: Spec) -> dict[str, Any]:
    """As `execute`, but an error makes a record too, `failed` being its reason in one line.

    `final` says whether another attempt would fail alike, as when the loss is no longer a number.
    """
    try:
        return execute(spec)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return failure(spec, _one_line(error), final=_is_final(error))


def failure(spec: Spec, reason: str, *, final: bool = False) -> dict[str, Any]:
    """The record of a run that came to nothing."""
    return {**spec.identity(), "failed": reason, "final": final}


def _is_final(error: Exception) -> bool:
    from isotune.experiments.loop import TrainingDiverged

    return isinstance(error, TrainingDiverged)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".removesuffix(": ")
