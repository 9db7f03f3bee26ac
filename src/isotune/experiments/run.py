"""One training run: the one value that says what it is, from the recipe to the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from isotune.experiments.recipe import Method, Recipe, Train
from isotune.experiments.records import FORMAT
from isotune.experiments.text import printable

WEIGHTS = Path("adapter", "model.safetensors")
"""In the folder of a trained head or model, what was trained."""


@dataclass(frozen=True)
class Run:
    """One method with one learning rate and one seed on one task, complete in itself.

    Args:
        name: the recipe's, for the record.
        label: the method's, in the comparison or training that the run belongs to.
        phase: "search", "seed" or, for a head that others start from, "start".
        recipe: with this run's method, rate and seed.
        folder: holds the checkpoints while it runs, and what it trained.
        logs: for what `train.report_to` names.
        untrained: for the scores of the model before training, shared by the runs that start from the same.
        start_from: the folder of a trained head, for `start_from_head`.
        threads: of the process; None leaves them as they are.
        search: how the learning rate is found, in words.
        earlier: the records of the same search's runs that ended before this one could begin; beside them it is stopped
            early where it is hopeless.
    """

    name: str
    label: str
    phase: str
    recipe: Recipe
    lr: float
    seed: int
    fingerprint: str
    folder: Path
    logs: Path
    record: Path
    untrained: Path
    start_from: Path | None = None
    threads: int | None = None
    search: str = ""
    earlier: tuple[Path, ...] = ()

    @property
    def method(self) -> Method:
        """The method that is trained."""
        return self.recipe.method

    @cached_property
    def settings(self) -> Train:
        """The training settings of the method."""
        return self.recipe.training(self.method)

    @property
    def key(self) -> tuple[str, float, int]:
        """What distinguishes this run from the others of its folder."""
        return self.label, self.lr, self.seed

    @property
    def needs_weights(self) -> bool:
        """Whether this is a head to start from whose weights are not there, as where only the records were kept."""
        return self.phase == "start" and not (self.folder / WEIGHTS).exists()

    def is_over(self, stored: Mapping[str, Any]) -> bool:
        """Whether a record is that of this run's end; one that an automatic search gave up is another search's loss."""
        return not stored.get("failed") and (not stored.get("stopped") or bool(self.earlier))

    @property
    def title(self) -> str:
        """The run in a line for people."""
        return printable(f"{self.label} lr {self.lr:g} seed {self.seed}")

    def identity(self) -> dict[str, Any]:
        """What a record says of the run before anything is trained."""
        return {
            "format": FORMAT,
            "recipe": self.name,
            "task": self.recipe.task,
            "label": self.label,
            "method": {"name": self.method.name, **self.method.options},
            "phase": self.phase,
            "model": self.recipe.model,
            "seed": self.seed,
            "lr": self.lr,
            "settings": self.settings.described(),
            "metric": self.recipe.metric,
        }
