"""Training a recipe: a comparison of its methods with one seed, in this process, whose weights are kept."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from isotune.experiments import methods, processes, table, tasks
from isotune.experiments.claim import claim, identity
from isotune.experiments.engines import ThisProcess
from isotune.experiments.execute import check_extras, hardware, versions
from isotune.experiments.files import read_object, write_json
from isotune.experiments.recipe import Recipe, RecipeError
from isotune.experiments.records import FORMAT, read_training
from isotune.experiments.schedule import Schedule, Variant, carry_out, repeated
from isotune.experiments.text import printable


def train(recipe: Recipe) -> dict[str, Any]:
    """Train and score a recipe, print a table, and write and return `result.json` in its output folder.

    Continues where an earlier call with the same recipe stopped; where that had finished, prints its result
    and does nothing else. Under torchrun or `accelerate launch` all processes train together, and the main one
    alone writes and prints; the folder must be one that all of them see.

    Raises:
        RecipeError: a value is wrong, or the folder holds something else.
        DataError: the data cannot be used.
        ModelError: the model cannot be loaded.
        TrainingDiverged: the loss is no longer a number.
    """
    for method in recipe.methods:
        methods.check(method)
    check_extras()
    processes.join()
    for method in recipe.methods:
        settings = recipe.training(method)
        processes.share_of(settings.batch_size // settings.gradient_accumulation)
    task = tasks.make(recipe)
    schedule = _schedule(recipe, task)
    folder = schedule.folder
    if processes.is_main():
        claim(folder, identity(recipe, schedule.about["fingerprint"]), "output=FOLDER")
    processes.wait_for_all()
    finished = folder / "result.json"
    if finished.exists():
        result = read_object(finished)
        _say(f"already finished; remove {folder} to run it again")
        _say(table.of_training(read_training(result, finished)))
        return result

    sizes = task.sizes
    _say(
        f"{sizes['train']} training, {sizes['validation']} validation and {sizes['test']} test examples; "
        f"results in {folder}"
    )
    schedule.load()
    started = time.perf_counter()
    _ = task.encoded  # so that no run is timed with it
    for _ in carry_out(schedule, ThisProcess(task)):
        pass
    result = _result(schedule)
    if not processes.is_main():
        return result
    if recipe.check_saved:
        result["saved"] = _check_saved(folder / result["runs"][_chosen(result)]["folder"])
    # The sum over the runs, and not the time since the start, which a resumed experiment does not know.
    result["seconds"] = sum(entry["seconds"] for entry in result["runs"])
    result["seconds_this_session"] = time.perf_counter() - started
    stored = read_training(result, finished)
    if recipe.chart:
        table.chart(stored, folder / "chart.png")
    write_json(finished, result)
    _say(table.of_training(stored))
    return result


def _schedule(recipe: Recipe, task: tasks.Task) -> Schedule:
    """One seed of each of the recipe's methods, at the rates that it gives them; its own method is the last."""
    variants = [Variant(m.name, m, tuple(dict.fromkeys(recipe.training(m).lr))) for m in recipe.methods]
    twice = repeated(variants)
    if twice is not None:
        raise RecipeError(f"the method {twice} is given twice; isotune compare trains one method with several options")
    if not task.sizes["validation"] and any(len(variant.rates) > 1 for variant in variants):
        raise RecipeError("several values of train.lr are chosen from on a validation set, and there is none")
    folder = Path(recipe.output or "runs/experiment")
    seeds = [recipe.train.seed]
    return Schedule(folder.name, recipe, variants, seeds, folder, task.described(), keep_adapters=True, separate=False)


def _result(schedule: Schedule) -> dict[str, Any]:
    """What is stored of a training: every run's record, with its folder and whether its rate was chosen."""
    runs = []
    for variant in schedule.variants:
        best = schedule.best(variant)
        for run in schedule.search(variant):
            record = schedule.records[run.key]
            runs.append({**record.content, "folder": run.folder.name, "chosen": run.lr == best})
    chosen = runs[_chosen({"runs": runs})]
    return {
        "format": FORMAT,
        "recipe": schedule.recipe.model_dump(mode="json"),
        "versions": versions(),
        "hardware": hardware(),
        "seed": schedule.recipe.train.seed,
        "metric": schedule.recipe.metric,
        "data": schedule.about,
        "runs": runs,
        "metrics": chosen["test"],
        "trainable_parameters": chosen["trainable_parameters"],
        "adapter_bytes": chosen["adapter_bytes"],
    }


def _chosen(result: dict[str, Any]) -> int:
    """The index of the run of the recipe's own method at its best rate."""
    return max(index for index, entry in enumerate(result["runs"]) if entry["chosen"])


def _say(text: str) -> None:
    if processes.is_main():
        print(printable(text, keep="\n"), flush=True)


def _check_saved(folder: Path) -> dict[str, Any]:
    """Score the saved adapter, reloaded and merged, in a new process; raises RuntimeError at failure."""
    print("reloading the saved adapter in a new process", flush=True)
    command = [sys.executable, "-m", "isotune.experiments.reload", str(folder.parent), folder.name]
    done = subprocess.run(command, capture_output=True, text=True, env=processes.environment_alone())
    if done.returncode:
        raise RuntimeError(f"reloading {folder} in a new process failed:\n{done.stderr}")
    return read_object(folder / "reloaded.json")
