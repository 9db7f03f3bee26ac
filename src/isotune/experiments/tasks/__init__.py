"""Tasks: what is learnt from which data. `execute.py` and `reload.py` treat every kind through `Task`."""

from __future__ import annotations

from importlib import import_module

from isotune.experiments.recipe import Recipe, RecipeError
from isotune.experiments.tasks.task import Task
from isotune.versions import install

__all__ = ["Task", "make"]

# Imported when asked for: each kind needs libraries that the others do not.
_CLASSES = {
    "text-classification": ("classification", "TextClassification"),
    "text-regression": ("classification", "TextRegression"),
    "chat": ("chat", "Chat"),
    "completion": ("chat", "Completion"),
    "preference": ("preference", "Preference"),
    "multiple-choice": ("commonsense", "MultipleChoice"),
    "math": ("math", "MathWords"),
    "image-classification": ("vision", "ImageClassification"),
}


def make(recipe: Recipe) -> Task:
    """The task of a recipe, its data read and checked.

    Raises:
        DataError: the data cannot be used.
        RecipeError: a library for this kind of task is missing.
    """
    module, name = _CLASSES[recipe.task]
    try:
        found = import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("isotune"):
            raise
        raise RecipeError(f"a task {recipe.task} needs {error.name}: {install('language')}") from error
    task: Task = getattr(found, name)(recipe)
    return task
