"""Carrying out one training run, wherever an engine puts it."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from isotune.experiments import processes
from isotune.experiments.files import read_json, read_object, storing, write_json
from isotune.experiments.recipe import Method, Recipe, RecipeError
from isotune.experiments.run import WEIGHTS, Run
from isotune.experiments.tasks.task import Task
from isotune.experiments.text import first_line
from isotune.versions import install

PREDICTIONS = "predictions.json"
"""In a run's folder, what the trained model answered to the test examples."""
RELOADED = "reloaded.json"
"""In a run's folder, the scores of what it saved, as `reload.py` finds them in another process."""


def execute(run: Run, task: Task | None = None) -> dict[str, Any]:
    """Carry out a run, from its last checkpoint where there is one, and write and return its record.

    Under torchrun all processes take part, and the main one alone writes. A run that had come to its end is not done
    again. `task` is the run's, where it has been made already.

    Raises:
        ValueError: the data are not those that the run was planned for, training diverged, or there is no room; the
            checkpoints are then left where they are.
        KeyboardInterrupt: Ctrl-C, once a checkpoint has been written.
    """
    import torch

    from isotune.experiments import tasks

    if run.record.exists() and not run.needs_weights and run.is_over(stored := read_object(run.record)):
        return stored
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if task is None:
        task = tasks.make(run.recipe)
        if task.fingerprint() != run.fingerprint:
            raise ValueError(
                "the data are not those that the comparison began with; its results would be about two different tasks"
            )
    (run.folder / RELOADED).unlink(missing_ok=True)  # of weights that are about to be replaced
    entry = _train(run, task)
    if processes.is_main():
        machine = {"versions": versions(), "hardware": hardware()}
        write_json(run.record, {**run.identity(), **machine, "data": task.described(), **entry})
        for checkpoint in run.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # what they were kept for, resuming and choosing, is over
    processes.wait_for_all()
    return read_object(run.record)


def _train(run: Run, task: Task) -> dict[str, Any]:
    """Train, score, measure and save; returns what the record has of it, in the main process."""
    import torch
    from safetensors.torch import load_file
    from transformers import set_seed

    from isotune.experiments import angles, loop, measure, methods, models
    from isotune.experiments.forgetting import Forgetting, ForgettingCurve
    from isotune.files.adapter import LABELS_FILE
    from isotune.files.base_model import quiet
    from isotune.methods.config import IsotuneConfig
    from isotune.model_card import write_card

    began = time.perf_counter()
    set_seed(run.seed)  # the new head and the adapter start alike in every run of this seed
    model, head = task.build()
    models.check_length(model, run.recipe.model, task.longest)
    if run.settings.start_from_head and run.method.name != "head":
        if run.start_from is None:
            raise RecipeError(f"start_from_head needs the method head to be trained before {run.method.name}")
        model.load_state_dict(load_file(run.start_from / WEIGHTS), strict=False)
    loading = time.perf_counter() - began
    untrained = _untrained(run, task, model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # where subspaces are searched fastest
    forgetting = None
    if run.recipe.measure_forgetting and task.tokenizer is not None:
        forgetting = Forgetting(model, task.tokenizer, run.untrained.parent)
    measure.reset_peak_memory()
    began = time.perf_counter()
    with quiet():
        method = methods.with_sizes(run.method, model, head, task.peft_type, task.inputs)
        model = methods.attach(method, model, head, task.peft_type)
    setup = time.perf_counter() - began
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and loop.is_head(n, head))
    watching = [ForgettingCurve(forgetting)] if forgetting is not None and forgetting.texts else []
    outcome = task.train(model, run, head, watching)
    if not processes.is_main():
        return {}
    device = next(outcome.model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=run.settings.autocast):
        kept = measure.kept_by_batch(outcome.model, task.training_batch(), task.loss)
    found = {
        "lr_search": run.search,
        "lr_head": run.settings.lr_head or run.lr,
        "trainable_parameters": trainable,
        "head_parameters": in_head,
        "adapter_parameters": trainable - in_head,
        "untrained": untrained,
        "validation": outcome.validation,
        "curve": outcome.curve,
        "load_seconds": loading,
        "setup_seconds": setup,
        "train_seconds": outcome.seconds,
        "evaluation_seconds": outcome.evaluation_seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "peak_memory_bytes": outcome.peak_memory,
        "peak_memory_of": measure.peak_memory_of(),
        "kept_bytes": kept,
    }
    if outcome.stopped is not None:
        return {**found, "stopped": outcome.stopped}
    with storing(f"the trained weights in {run.folder}"):
        saved = _save(run.method, outcome.model, run.folder / "adapter")
        if task.processor is not None:
            task.processor.save_pretrained(str(run.folder / "adapter"))
        config = getattr(outcome.model, "peft_config", {}).get("default")
        if isinstance(config, IsotuneConfig):
            write_card(run.folder / "adapter", config, {f"test {name}": value for name, value in outcome.test.items()})
    if labels := task.about().get("labels"):
        write_json(run.folder / "adapter" / LABELS_FILE, {"id2label": {str(i): name for i, name in enumerate(labels)}})
    write_json(run.folder / PREDICTIONS, outcome.predictions)
    # Of several sets the score is a mean, and their examples do not count alike.
    several = len(task.about().get("sets", {})) > 1
    answers = None if several else task.answers(outcome.predictions)
    # On the way it was measured under autocast, where the training has that.
    changes = {p["step"]: p["forgetting"] for p in outcome.curve if "forgetting" in p and not run.settings.autocast}
    return {
        **found,
        "test": outcome.test,
        "interval": None if answers is None else answers.interval(run.recipe.metric),
        "answers": None if answers is None else answers.stored(),
        "best_step": outcome.best_step,
        "forgetting": forgetting and forgetting.after(outcome.model, changes.get(outcome.best_step)),
        "geometry": angles.adapter_geometry(outcome.model),
        "adapter_bytes": saved.stat().st_size,
    }


def _untrained(run: Run, task: Task, model: Any) -> dict[str, float] | None:
    """The test scores of the model that a run starts from, found once for all runs that start from the same."""
    wanted = run.recipe.score_untrained
    if wanted is None:
        wanted = not task.generates
    if not wanted:
        return None
    if run.start_from is not None:
        return task.score(read_json(run.start_from / PREDICTIONS))
    known = run.untrained.exists()
    processes.wait_for_all()  # all have looked before one of them writes
    if not known:
        scores = task.score_untrained(model)
        if processes.is_main():
            write_json(run.untrained, {"scores": scores})
        processes.wait_for_all()
    found: dict[str, float] | None = read_object(run.untrained)["scores"]
    return found


def _save(method: Method, model: Any, folder: Path) -> Path:
    """Save what was trained, and return the file that holds it."""
    from safetensors.torch import save_file, save_model

    from isotune.internals.safetensors_files import readable

    if method.name not in ("head", "full"):
        # The embeddings are the base model's; asking whether they changed would ask the Hub.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return folder / "adapter_model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    if method.name == "head":
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(weights, file, metadata={"format": "pt"})
    else:
        save_model(model, str(file), metadata={"format": "pt"})
    readable(file)
    return file


def attempt(run: Run) -> dict[str, Any]:
    """Carry out a run as `execute` does, and make of an error a record too, `failed` being its reason in one line."""
    from isotune.experiments.progress import TrainingDiverged

    try:
        return execute(run)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        said = first_line(error)
        named = isinstance(error, ValueError) or said == type(error).__name__
        return failure(
            run, said if named else f"{type(error).__name__}: {said}", final=isinstance(error, TrainingDiverged)
        )


def failure(run: Run, reason: str, *, final: bool = False) -> dict[str, Any]:
    """The record of a run that came to nothing; `final` where another attempt would fail alike."""
    return {**run.identity(), "failed": reason, "final": final}


def versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    from isotune import __version__  # its metadata are missing where the sources are run without an installation

    names = ("torch", "transformers", "peft", "accelerate", "scikit-learn", "numpy")
    others = {name: metadata.version(name) for name in names}
    commit = _commit()
    return {
        "python": platform.python_version(),
        "isotune": __version__,
        **({"isotune commit": commit} if commit else {}),
        **others,
    }


@functools.cache
def _commit() -> str | None:
    """The commit of the repository that isotune is run from, "-dirty" where files differ; None where there is none."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a repository that only holds the environment
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


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


def check_extras(recipe: Recipe, trained: Iterable[Method]) -> None:
    """Check that the packages which training these methods needs are installed; raises RecipeError."""
    missing = _missing("accelerate", "sklearn", "matplotlib")
    if missing:
        raise RecipeError(f"training needs {' and '.join(missing)}: {install('train')}")
    for tracker in dict.fromkeys(name for method in trained for name in recipe.training(method).report_to):
        if _missing(tracker):
            raise RecipeError(f"train.report_to={tracker} needs {tracker}: pip install {tracker}")


def _missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]
