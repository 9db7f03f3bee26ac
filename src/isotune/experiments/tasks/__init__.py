"""Tasks: what is learnt from which data. `run.py` and `reload.py` treat every kind through `Task`."""

from __future__ import annotations

from importlib import import_module

from isotune.experiments.recipe import Recipe
from isotune.experiments.tasks.task import Job, Task

__all__ = ["Job", "Task", "make"]

# Imported when asked for: each kind needs libraries that the others do not.
_CLASSES = {
    "text-classification": ("classification", "TextClassification"),
    "text-regression": ("classification", "TextRegression"),
    "image-classification": ("vision", "ImageClassification"),
}


def make(recipe: Recipe) -> Task:
    """The task of a recipe, its data read and checked; raises DataError."""
    module, name = _CLASSES[recipe.task]
    task: Task = getattr(import_module(f"{__name__}.{module}"), name)(recipe)
    return task
