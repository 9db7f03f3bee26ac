"""Training a recipe: a comparison of its methods with one seed, in this process, whose weights are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isotune.experiments import methods, processes, tasks
from isotune.experiments.engines import ThisProcess
from isotune.experiments.execute import check_extras
from isotune.experiments.rates import Given
from isotune.experiments.recipe import Recipe
from isotune.experiments.runner import carry_out
from isotune.experiments.schedule import Schedule, Variant


def train(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """Train and score a recipe, and write and return what `comparison.json` in its output folder then holds.

    What is returned says besides where the `adapter` of the recipe's own method lies.

    Continues where an earlier call with the same recipe stopped. Where that had finished, nothing is trained. `command`
    is what repeats the training, for the record.

    Raises:
        RecipeError: a value is wrong, or the folder holds something else.
        DataError: the data cannot be used.
        ModelError: the model cannot be loaded.
        TrainingDiverged: the loss is no longer a number.
    """
    schedule = plan(recipe)
    schedule.details = {"command": command}
    return carry_out(schedule, ThisProcess(schedule.task))


def plan(recipe: Recipe) -> Schedule:
    """The runs of a recipe: one seed of each of its methods, at the rates that it gives them, its own method last.

    Nothing is written or trained. Raises as `train` about recipe and data.
    """
    read = [methods.checked(method) for method in recipe.baselines]
    recipe = recipe.model_copy(update={"baselines": read, "method": methods.checked(recipe.method)})
    variants = [Variant(m.name, m, Given(tuple(sorted(set(recipe.training(m).lr))))) for m in recipe.methods]
    check_extras(recipe, recipe.methods)
    processes.join()
    for method in recipe.methods:
        settings = recipe.training(method)
        processes.share_of(settings.batch_size // settings.gradient_accumulation)
    folder = Path(recipe.output or "runs/experiment")
    return Schedule(folder.name, recipe, variants, [recipe.train.seed], folder, tasks.make(recipe), training=True)
