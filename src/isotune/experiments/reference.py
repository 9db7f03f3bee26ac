"""All keys of a recipe with their usual values, and what their sections say of them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from isotune.experiments.recipe import Recipe, RecipeError, keys_of, meant, sections_in

_WIDTH = 100
_AS_METHOD = "baselines"
"""A list of what `method` is, whose keys are told there."""


def reference(prefix: str = "") -> dict[str, Any]:
    """Key -> usual value, of the keys that are `prefix` or stand below it; needed ones have the value "needed".

    Raises:
        RecipeError: there is no such key.
    """
    known = {key: usual for _, keys in _sections(Recipe) for key, usual in keys.items()}
    found = {key: usual for key, usual in known.items() if not prefix or f"{key}.".startswith(f"{prefix}.")}
    if not found:
        raise RecipeError(f"a recipe has no key {prefix!r}" + meant(prefix, keys_of(Recipe)))
    return found


def to_text(prefix: str = "") -> str:
    """The keys of `reference` with their usual values, each section below what it says of itself."""
    chosen = reference(prefix)
    width = max(map(len, chosen))
    lines: list[str] = []
    for about, keys in _sections(Recipe):
        own = [f"{key:{width}}  {json.dumps(usual)}" for key, usual in keys.items() if key in chosen]
        lines += [*textwrap.wrap(about, _WIDTH, initial_indent="# ", subsequent_indent="# "), *own, ""] if own else []
    return "\n".join(lines).rstrip()


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """What each section says of itself, and its own keys."""
    keys, below = {}, []
    for name, field in model.model_fields.items():
        inner = sections_in(field.annotation)
        if not inner or name == _AS_METHOD:
            usual = "needed" if field.is_required() else field.get_default(call_default_factory=True)
            keys[prefix + name] = usual
        below += [(one, f"{prefix}{name}.") for one in inner if name != _AS_METHOD]
    yield " ".join((model.__doc__ or "").split()), keys
    for one, name in below:
        yield from _sections(one, name)
