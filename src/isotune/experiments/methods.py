"""From a method's name in a recipe to an adapter configuration."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from isotune.experiments.recipe import Method, RecipeError, meant
from isotune.experiments.registry import HEADS, entry, is_plain
from isotune.experiments.sections import NO_TRUTH, may_be_true
from isotune.experiments.text import shown
from isotune.methods import METHODS

SIZE_CHOICES = ("rank_budget", "rank_energy", "rank_measure")
"""Options by which sizes are chosen, in the place of which chosen sizes stand."""
# Set by the loop itself, from the task and the model.
_RESERVED = ("task_type", "inference_mode", "modules_to_save", "peft_type", "auto_mapping", "peft_version")


def _config_class(name: str) -> tuple[type, Mapping[str, Any]]:
    """The configuration class of a method and the fields that its name fixes."""
    import peft

    found = entry(name)
    baselines: dict[str, type] = {"lora": peft.LoraConfig, "vera": peft.VeraConfig}
    assert found.base is not None
    return METHODS.get(found.base) or baselines[found.base], found.fixed


def checked(method: Method) -> Method:
    """The method with its options as its configuration class reads them, such as 8 for the text "8".

    What says nothing, None where that is the default, is left out.

    Raises:
        RecipeError: an option that the class does not have, or a value that it does not take.
    """
    if is_plain(method.name):
        if method.options:
            raise RecipeError(f"the method {method.name} has no options, given {', '.join(method.options)}")
        return method
    cls, fixed = _config_class(method.name)
    hints = typing.get_type_hints(cls)
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.init and field.name not in _RESERVED and field.name not in fixed
    }
    read = {}
    for key, value in method.options.items():
        if key not in defaults:
            allowed = sorted(defaults)
            said = f"unknown key 'method.{key}': {method.name} allows {', '.join(allowed)}"
            raise RecipeError(said + meant(key, allowed, "method."))
        try:
            found = _adapter(hints[key]).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Input ")
            raise RecipeError(f"method.{key}: {message}, not {shown(value)}") from error
        if isinstance(value, bool) and not may_be_true(hints[key]):
            raise RecipeError(f"method.{key}: {NO_TRUTH}, not {shown(value)}")
        if found is not None or defaults[key] is not None:
            read[key] = found
    try:
        adapter_config(method.name, **read)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"method {method.name}: {error}") from error
    return Method(name=method.name, train=method.train, **read)


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint)
    except Exception:  # a type that pydantic has no schema for; the configuration class then checks by itself
        return TypeAdapter(Any)


def adapter_config(name: str, **options: Any) -> Any:
    """The adapter configuration of a method: one of isotune's, or of PEFT's lora, rslora, dora, pissa and vera.

    Unless the options say otherwise all linear layers are adapted and the scale of the update is one:
    PEFT's `lora_alpha` equals the rank, as isotune's alphas do of themselves.

    Raises:
        TypeError: an option that the class does not have.
        ValueError: a value that it does not take.
    """
    cls, fixed = _config_class(name)
    if cls not in METHODS.values() and "lora_alpha" in (parameters := inspect.signature(cls).parameters):
        options.setdefault("lora_alpha", options.get("r", parameters["r"].default))
    return cls(**{"target_modules": "all-linear", **options, **fixed})


def attach(method: Method, model: Any, head: list[str], peft_type: str | None) -> Any:
    """Make a model trainable by a checked method, wrapped by PEFT where it is an adapter.

    Args:
        model: the base model, which is changed.
        head: names of modules that are trained and saved with an adapter.
        peft_type: what PEFT calls the kind of model; PEFT then trains and saves a classifier's HEADS by itself.
    """
    if method.name == "full":
        return model
    if method.name == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in head for part in name.split(".")))
        return model
    import peft

    return peft.get_peft_model(model, _config_for(method, head, peft_type))


def _config_for(method: Method, head: list[str], peft_type: str | None) -> Any:
    import peft

    config = adapter_config(method.name, **method.options)
    config.task_type = peft_type and peft.TaskType(peft_type)
    config.modules_to_save = [name for name in head if peft_type != "SEQ_CLS" or name not in HEADS]
    return config


def chooses_sizes(method: Method) -> bool:
    """Whether the options of a method ask for sizes that are chosen for the model."""
    return not is_plain(method.name) and getattr(adapter_config(method.name, **method.options), "chooses_sizes", False)


def with_sizes(
    method: Method,
    model: Any,
    head: list[str],
    peft_type: str | None,
    inputs: Callable[[], Iterable[Mapping[str, Any]]],
) -> Method:
    """The method with the sizes that its options ask for, chosen for a base model; itself if they ask for none.

    Args:
        method: a checked method.
        model: the base model with its weights, which is not changed.
        head, peft_type: as in `attach`.
        inputs: what makes batches as the model takes them, for sizes by the energy of activations.
    """
    from isotune.tools.ranks import choose_ranks

    if not chooses_sizes(method):
        return method
    config = _config_for(method, head, peft_type)
    found = choose_ranks(model, config, data=inputs() if config.by_activations else None)
    kept = {key: value for key, value in method.model_dump().items() if key not in SIZE_CHOICES}
    return Method.model_validate({**kept, **found.options})
