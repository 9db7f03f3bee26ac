"""What an experiment would train, and what it would need, found without training or writing anything."""

from __future__ import annotations

import math
from typing import Any

import yaml

from isotune.experiments import methods, processes
from isotune.experiments.planning.estimate import Built, estimate
from isotune.experiments.planning.setting import Setting
from isotune.experiments.planning.show import size
from isotune.experiments.recipe import Recipe, Train
from isotune.experiments.schedule import Schedule
from isotune.experiments.text import aligned
from isotune.files.base_model import gguf_of, resolve_base


def preview(schedule: Schedule) -> dict[str, Any]:
    """The effective recipe, and of each method its rates, steps, trainable parameters and estimated memory.

    Raises:
        ModelError: the model cannot be loaded.
        ValueError: a step of it cannot be followed without its weights.
    """
    task, recipe = schedule.task, schedule.recipe
    rows = []
    for variant in schedule.variants:
        settings, method = recipe.training(variant.method), variant.method
        built = None
        # The class of a language model is named by its configuration, so that no weights need be loaded.
        if methods.chooses_sizes(method) or task.peft_type != "CAUSAL_LM" or gguf_of(resolve_base(recipe.model)):
            model, head = task.build()
            method = methods.with_sizes(method, model, head, task.peft_type, task.inputs)
            built = Built(model.to("meta"), recipe.dtype, head, task.peft_type)
        setting = Setting(
            model=recipe.model,
            method=method.name,
            options=method.options,
            dtype=recipe.dtype,
            batch=task.sequences * processes.share_of(settings.batch_size // settings.gradient_accumulation),
            sequence=settings.max_length,
            image_size=recipe.image_size,
            checkpointing=settings.gradient_checkpointing,
            autocast=settings.autocast,
            new_head=True,
        )
        found = estimate(setting, built)
        rows.append(
            {
                "label": variant.label,
                "lr": list(variant.rates),
                "steps": steps(settings, task.sizes["train"]),
                "trainable_parameters": found.trained_parameters,
                "memory": found.memory,
                "memory_bytes": found.total,
            }
        )
    return {
        "recipe": _said(recipe),
        "folder": str(schedule.folder),
        "runs": schedule.total(),
        "data": schedule.about,
        "notes": schedule.notes,
        "methods": rows,
    }


def steps(settings: Train, examples: int) -> int:
    """How many updates a run has, as transformers' Trainer counts them."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(examples / (settings.batch_size // settings.gradient_accumulation))
    return math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))


def _said(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a file could say it, with all values that differ from the defaults."""
    return recipe.model_dump(mode="json", exclude_defaults=True)


def to_text(found: dict[str, Any]) -> str:
    """What `preview` found, for people: the recipe as YAML, and a table of the methods."""
    lines = [("method", "lr", "steps", "trainable parameters", "memory")]
    for row in found["methods"]:
        rates = ", ".join(f"{lr:g}" for lr in row["lr"])
        cells = f"{row['steps']:,}", f"{row['trainable_parameters']:,}", size(row["memory_bytes"])
        lines.append((row["label"], rates, *cells))
    table = aligned(lines, "<<>>>")
    data = found["data"]
    return "\n".join(
        [
            yaml.safe_dump(found["recipe"], sort_keys=False, allow_unicode=True, width=100),
            *table,
            "",
            *found["notes"],
            f"{data['train']:,} training, {data['validation']:,} validation and {data['test']:,} test examples; "
            f"{found['runs']} run{'s' * (found['runs'] != 1)}; results would be in {found['folder']}",
            "memory: of one device in a step, estimated as `isotune plan` does, with every sequence of full length",
        ]
    )
