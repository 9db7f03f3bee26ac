"""From a recipe to a result: every method and learning rate trained, chosen on validation, scored on test."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from isotune.experiments import measure, methods, processes, summary, tasks
from isotune.experiments.files import read_json, storing, write_json
from isotune.experiments.recipe import Method, Recipe, RecipeError
from isotune.files.base_model import quiet

FORMAT = 1
# What may differ between two runs of one experiment without making them two experiments.
NOT_IDENTITY = ("output", "description", "group", "chart", "check_saved")


def run(recipe: Recipe) -> dict[str, Any]:
    """Train and score a recipe, print a table, and write `result.json` in its output folder.

    Continues where an earlier call with the same recipe stopped; where that had finished, prints its result
    and does nothing else. Under torchrun or `accelerate launch` all processes train together, and the main one
    alone writes and prints; the folder must be one that all of them see. Raises RecipeError, DataError, ModelError
    or TrainingDiverged, all of them ValueErrors with one line for the user.
    """
    for method in recipe.methods:
        methods.check(method)
    check_extras()
    processes.join()
    for method in recipe.methods:
        settings = recipe.training(method)
        processes.share_of(settings.batch_size // settings.gradient_accumulation)
    task = tasks.make(recipe)
    _check_choice(recipe, task)
    folder = Path(recipe.output or "runs/experiment")
    identity: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json", exclude=set(NOT_IDENTITY)),
        "data": task.fingerprint(),
    }
    if processes.is_main():
        claim(folder, identity)
    processes.meet()
    finished = folder / "result.json"
    if finished.exists():
        result: dict[str, Any] = read_json(finished)
        _say(f"already finished; remove {folder} to run it again")
        _say(summary.table(result))
        return result

    sizes = task.sizes
    _say(
        f"{sizes['train']} training, {sizes['validation']} validation and {sizes['test']} test examples; "
        f"results in {folder}"
    )
    started = time.perf_counter()
    task.prepare()
    trained: list[dict[str, Any]] = []
    for method in recipe.methods:
        head = next((folder / e["folder"] for e in trained if e["chosen"] and e["method"]["name"] == "head"), None)
        rates = recipe.training(method).lr
        names = {lr: method.name if len(rates) == 1 else f"{method.name}-lr={lr:g}" for lr in rates}
        tried = [train_one(recipe, method, lr, task, folder / names[lr], head) for lr in rates]
        best = max(range(len(tried)), key=lambda i: recipe.merit(tried[i]["validation"]))
        trained += [{**entry, "chosen": i == best} for i, entry in enumerate(tried)]
    chosen = next(entry for entry in reversed(trained) if entry["chosen"])  # the recipe's own method is last
    result = {
        "format": FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "hardware": hardware(),
        "seed": recipe.train.seed,
        "metric": recipe.metric,
        "data": {**task.sizes, **task.about(), "fingerprint": identity["data"]},
        "runs": trained,
        "metrics": chosen["test"],
        "trainable_parameters": chosen["trainable_parameters"],
        "adapter_bytes": chosen["adapter_bytes"],
    }
    if not processes.is_main():
        return result
    if recipe.check_saved:
        result["saved"] = _check_saved(chosen, folder)
    # The sum over the runs, and not the time since the start, which a resumed experiment does not know.
    result["seconds"] = sum(entry["seconds"] for entry in trained)
    result["seconds_this_session"] = time.perf_counter() - started
    if recipe.chart:
        summary.chart(result, folder / "chart.png")
    write_json(finished, result)
    _say(summary.table(result))
    return result


def _say(text: str) -> None:
    if processes.is_main():
        print(text, flush=True)


def versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    names = ("isotune", "torch", "transformers", "peft", "accelerate", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def hardware() -> dict[str, Any]:
    """The machine that a result was made on."""
    import torch

    return {
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def check_extras() -> None:
    """Raise a RecipeError where a package that training needs is not installed."""
    missing = [name for name in ("accelerate", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"training needs {' and '.join(missing)}: pip install 'isotune[train]'")


def _check_choice(recipe: Recipe, task: tasks.Task) -> None:
    if not task.sizes["validation"]:
        for method in recipe.methods:
            if len(recipe.training(method).lr) > 1:
                raise RecipeError("several values of train.lr are chosen from on a validation set, and there is none")


def claim(folder: Path, identity: dict[str, Any], how: str = "output=FOLDER") -> None:
    """Take the folder for this experiment; raises RecipeError where it holds another's results.

    `how` is what the error says to give for another folder.
    """
    stored = folder / "experiment.json"
    if stored.exists():
        other = read_json(stored)
        if other != identity:
            raise RecipeError(
                f"{folder} holds the results of another experiment ({_difference(other, identity)}); "
                f"give another folder with {how}, or remove it"
            )
        return
    # A process that was killed while it wrote the claim has left no more than that file under its first name.
    if folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(f".{stored.name}.") for path in folder.iterdir())
    ):
        raise RecipeError(f"{folder} exists and holds something else; give another folder with {how}")
    write_json(stored, identity)


def _difference(old: Any, new: Any, key: str = "") -> str:
    """The first key in which two experiments differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                return _difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    if key == "data":
        return "the data have changed"
    return f"{key.removeprefix('recipe.')} is {old!r} there and {new!r} here"


def train_one(
    recipe: Recipe, method: Method, lr: float, task: tasks.Task, folder: Path, start_from: Path | None
) -> dict[str, Any]:
    """Train one method at one learning rate in a folder of its own, or read what it stored at its end.

    `start_from` is the folder of a finished run of the method head, where the recipe starts from one. Returns what the
    folder's `run.json` then holds: the run's settings, scores and measures.
    """
    from transformers import set_seed

    from isotune.experiments import angles, loop

    settings = recipe.training(method)
    stored = folder / "run.json"
    if stored.exists():
        kept: dict[str, Any] = read_json(stored)
        return kept
    began = time.perf_counter()
    set_seed(settings.seed)  # the new head and the adapter start alike in every run of this seed
    model, head = task.build()
    if settings.start_from_head and method.name != "head":
        if start_from is None:
            raise RecipeError(f"start_from_head needs the method head to be trained before {method.name}")
        _start_from(model, start_from)
    setup = time.perf_counter() - began
    tokenizer = task.tokenizer()
    forgetting = measure.Forgetting(model, tokenizer) if tokenizer is not None else None
    measure.reset_peak_memory()
    began = time.perf_counter()
    with quiet():
        model = methods.attach(method, model, head, task.peft_type)
    setup += time.perf_counter() - began
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and loop.is_head(n, head))
    entry: dict[str, Any] = {
        "method": {"name": method.name, **method.options},
        "lr": lr,
        "lr_head": settings.lr_head or lr,
        "trainable_parameters": trainable,
        "head_parameters": in_head,
        "adapter_parameters": trainable - in_head,
    }
    outcome = task.train(model, tasks.Job(method, settings, lr, head, folder, f"{method.name} lr {lr:g}"))
    if not processes.is_main():
        processes.meet()
        found: dict[str, Any] = read_json(stored)
        return found
    if outcome.untrained:
        entry["untrained"] = outcome.untrained
    peak = measure.peak_memory()  # before what follows, which is no part of the run
    with storing(f"the trained weights in {folder}"):
        saved = _save(method, outcome.model, folder / "adapter")
    write_json(folder / "predictions.json", outcome.predictions)
    entry |= {
        "validation": outcome.validation,
        "test": outcome.test,
        "interval": measure.interval(
            recipe.metric, outcome.test[recipe.metric], outcome.predictions, outcome.references
        ),
        "best_step": outcome.best_step,
        "curve": outcome.curve,
        "seconds": setup + outcome.seconds,
        "train_seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "peak_memory_bytes": peak,
        "kept_bytes": measure.kept_by_batch(outcome.model, task.training_batch(), task.loss),
        "forgetting": forgetting.after(outcome.model) if forgetting is not None else None,
        "geometry": angles.adapter_geometry(outcome.model),
        "adapter_bytes": saved.stat().st_size,
        "folder": folder.name,
    }
    write_json(stored, entry)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # what they were kept for, resuming and choosing, is over
    processes.meet()
    return entry


def _start_from(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "adapter" / "model.safetensors"), strict=False)


def _save(method: Method, model: Any, folder: Path) -> Path:
    """Save what was trained, and return the file that holds it."""
    if method.name == "head":
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder / "model.safetensors"
    if method.name == "full":
        from safetensors.torch import save_model

        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return folder / "model.safetensors"
    # The embeddings are the base model's; asking whether they changed would ask the Hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder / "adapter_model.safetensors"


def _check_saved(chosen: dict[str, Any], output: Path) -> dict[str, Any]:
    """Score the saved adapter, reloaded and merged, in a new process; raises RuntimeError at failure."""
    print("reloading the saved adapter in a new process", flush=True)
    command = [sys.executable, "-m", "isotune.experiments.reload", str(output), chosen["folder"]]
    done = subprocess.run(command, capture_output=True, text=True, env=processes.environment_alone())
    if done.returncode:
        raise RuntimeError(f"reloading {output / chosen['folder']} in a new process failed:\n{done.stderr}")
    found: dict[str, Any] = read_json(output / chosen["folder"] / "reloaded.json")
    return found
