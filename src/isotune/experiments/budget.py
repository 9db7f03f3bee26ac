"""Parameters of adapters: counted on a model without its weights, and brought near to a budget."""

from __future__ import annotations

import bisect
import copy
import functools
from collections.abc import Callable
from typing import Any

from isotune.experiments.files import packaged_object
from isotune.experiments.methods import SIZE_CHOICES
from isotune.experiments.recipe import Method, Recipe
from isotune.experiments.registry import entry

_LARGEST = 1 << 16


def match(method: Method, target: int, count: Callable[[Method], int]) -> Method:
    """`method` with the size at which `count` of it is nearest to `target` parameters, the lower of two as near.

    It stays as it is where it has a size in its options, or none to choose. `count` raises ValueError for a size that
    does not fit the model.
    """
    known = entry(method.name)
    option = known.size_option
    if option is None or option in method.options or method.options.keys() & {*SIZE_CHOICES}:
        return method
    counted: dict[int, int | None] = {}

    def parameters(size: int) -> int | None:
        if size not in counted:
            try:
                counted[size] = count(sized(size))
            except ValueError:
                counted[size] = None
        return counted[size]

    def sized(size: int) -> Method:
        return Method.model_validate({**method.model_dump(), option: size})

    def above(rank: int) -> bool:
        found = parameters(rank)
        return found is None or found > target

    if option == "r":
        # Parameters grow with the rank: both beside the target are counted on the way to it.
        bisect.bisect_left(range(known.size_step, _LARGEST, known.size_step), True, key=above)
    else:
        # Blocks must divide the inputs of every layer, so that few sizes fit, all of them quickly counted.
        for size in range(2, 257):
            found = parameters(size)
            if found is not None and found > 2 * target:
                break
    fitting = {size: found for size, found in counted.items() if found is not None}
    if not fitting:
        return method
    return sized(min(fitting, key=lambda size: (abs(fitting[size] - target), size)))


def counter(model: Any, head: list[str], peft_type: str | None) -> Callable[[Method], int]:
    """What counts the parameters of a method's adapter on a model, those of the modules in `head` left out.

    The model is moved to the meta device: it has only shapes from then on, and nothing is computed.
    """
    import torch

    from isotune.experiments.loop import is_head
    from isotune.experiments.methods import attach
    from isotune.files.base_model import quiet

    bare = model.to("meta")

    def count(method: Method) -> int:
        with quiet(), torch.device("meta"):
            adapted = attach(method, copy.deepcopy(bare), head, peft_type)
        return sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and not is_head(n, head))

    return count


def adapter_parameters(recipe: Recipe) -> int | None:
    """Parameters of the adapter of a recipe's method, those of a new head left out; None for a model not known here.

    Known are the packaged recipes' models, by the dimensions in architectures.json that their configurations publish.
    """
    if recipe.model not in packaged_object("architectures.json"):
        return None
    return _counted(recipe.task, recipe.model, recipe.method.model_dump_json())


@functools.cache
def _counter(task: str, name: str) -> Callable[[Method], int]:
    import torch
    import transformers

    from isotune.experiments import models

    published = packaged_object("architectures.json")[name]
    config = transformers.AutoConfig.for_model(**published["config"])
    kind: str | None = "SEQ_CLS"
    with torch.device("meta"):
        if task in ("multiple-choice", "math"):
            model, kind = transformers.AutoModelForCausalLM.from_config(config), "CAUSAL_LM"
        elif task == "image-classification":
            model, kind = transformers.AutoModelForImageClassification.from_config(config), None
        elif config.model_type == "bert":
            encoder = transformers.AutoModel.from_config(config, add_pooling_layer=False)
            # With a configuration of its own: the encoder notes in its what the classifier has not.
            model = models.MeanPooledClassifier(transformers.AutoConfig.for_model(**published["config"]), encoder)
        else:
            model = transformers.AutoModelForSequenceClassification.from_config(config)
    return counter(model, published["new"], kind)


@functools.cache
def _counted(task: str, name: str, method: str) -> int:
    return _counter(task, name)(Method.model_validate_json(method))
