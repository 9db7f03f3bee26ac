"""How many parameters a recipe trains, counted on its model's published dimensions without its weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

from isotune.experiments.recipe import Method, Recipe


def adapter_parameters(recipe: Recipe) -> int | None:
    """Parameters of the adapter of a recipe's method, those of a new head left out; None for a model not known here.

    Known are the packaged recipes' models, by the dimensions in architectures.json that their configurations publish.
    """
    if recipe.model not in _published():
        return None
    return _counter(recipe.task, recipe.model)(recipe.method)


@functools.cache
def _published() -> dict[str, Any]:
    text = resources.files("isotune.experiments").joinpath("architectures.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@functools.cache
def _counter(task: str, name: str) -> Callable[[Method], int]:
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    from isotune.experiments import budget, models

    published = _published()[name]["config"]
    config = AutoConfig.for_model(**published)
    with torch.device("meta"):
        if task in ("multiple-choice", "math"):
            model, kind = AutoModelForCausalLM.from_config(config), "CAUSAL_LM"
        elif task == "image-classification":
            model, kind = AutoModelForImageClassification.from_config(config), None
        elif config.model_type == "bert":
            encoder = AutoModel.from_config(config, add_pooling_layer=False)
            # With a configuration of its own: the encoder notes in its what the classifier has not.
            model, kind = models.MeanPooledClassifier(AutoConfig.for_model(**published), encoder), "SEQ_CLS"
        else:
            model, kind = AutoModelForSequenceClassification.from_config(config), "SEQ_CLS"
    count = budget.counter(model, _published()[name]["new"], kind)
    counted: dict[str, int] = {}

    def remembered(method: Method) -> int:
        key = method.model_dump_json()
        if key not in counted:
            counted[key] = count(method)
        return counted[key]

    return remembered
