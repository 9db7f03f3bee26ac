"""Finding a recipe, packaged by name or in a file by path, and putting overrides over it."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from isotune.experiments.recipe import Recipe, RecipeError, meant, validate
from isotune.experiments.text import YamlError, from_yaml, shown


def packaged() -> dict[str, dict[str, Any]]:
    """The packaged recipes: {name as given to `isotune train`: its mapping, for the caller to change}, sorted by name.

    A file with the key `tasks` is a suite: each of its tasks is put over the file's `defaults`.
    """
    return copy.deepcopy(_packaged())


@functools.cache
def _packaged() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in (resources.files("isotune.experiments") / "recipes").iterdir():
        if entry.name.endswith(".yaml"):
            name = entry.name.removesuffix(".yaml")
            raw = _parse(entry.read_text(encoding="utf-8"), f"packaged recipe {name}")
            if "tasks" in raw:
                defaults = raw.get("defaults", {})
                found |= {f"{name}/{task}": over(defaults, own) for task, own in raw["tasks"].items()}
            else:
                found[name] = raw
    return dict(sorted(found.items()))


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` put over `below`, key by key; null takes a key away."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = over(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return {key: value for key, value in merged.items() if value is not None}


def load(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a packaged recipe by name, or a YAML file by path, and put `key=value` overrides, of YAML, over it.

    `variant=NAME` first puts that part of the recipe's `variants` over it, whichever its place among the overrides.

    Raises:
        RecipeError: one line that says which key, what is allowed and the nearest valid name.
    """
    raw, where = _read(source)
    values = [assignment(text, "an override is key=value, such as train.lr=1e-3") for text in overrides]
    variant = dict(values).get("variant")
    raw = _varied(raw, variant, where)
    for key, value in values:
        if key != "variant":
            _override(raw, key, value)
    recipe = validate(raw, where)
    if recipe.output is None:
        name = source if source in packaged() else Path(source).stem
        recipe.output = str(Path("runs") / (name if variant is None else f"{name}-{variant}"))
    return recipe


def _varied(raw: dict[str, Any], variant: Any, where: str) -> dict[str, Any]:
    """A recipe without its variants, with one of them put over it."""
    variants = raw.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(one, dict) for one in variants.values()):
        raise RecipeError(f"{where}: variants should be names, each with keys of a recipe below it")
    if variant is None:
        return raw
    if variant not in list(variants):
        known = f"variants: {', '.join(variants)}" if variants else "it has none at all"
        raise RecipeError(f"{where}: there is no variant {shown(variant)}; {known}" + meant(str(variant), variants))
    return over(raw, variants[variant])


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        raw = from_yaml(text)
    except YamlError as error:
        line = "" if error.line is None else f", line {error.line}"
        raise RecipeError(f"{where}{line}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, not {type(raw).__name__}")
    return raw


def _read(source: str) -> tuple[dict[str, Any], str]:
    known = packaged()
    if source in known:
        return known[source], f"packaged recipe {source}"
    path = Path(source)
    if not path.exists():
        if path.suffix in {".yaml", ".yml"}:
            near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.y*ml")], n=1)
            nearest = f"; did you mean {str(path.parent / near[0])!r}?" if near else ";"
            raise RecipeError(f"there is no recipe file {source}{nearest} `isotune init` writes one")
        nearest = meant(source, known)
        raise RecipeError(
            f"there is no recipe {shown(source)}{nearest or ';'} `isotune recipes` lists all, and a YAML file is given "
            "by its path"
        )
    if path.suffix in {".jsonl", ".csv", ".tsv"}:
        raise RecipeError(f"{source} holds data and is no recipe; `isotune init --data {source}` writes one for it")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {source}: {error}") from error
    return _parse(text, source), source


def assignment(text: str, example: str) -> tuple[str, Any]:
    """The key and the value, which is YAML, of a text of the form of `example`."""
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"{example}, not {shown(text)}")
    try:
        return key, from_yaml(value)
    except YamlError as error:
        raise RecipeError(f"{key}: the value {shown(value)} is not valid YAML: {error}") from error


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    node = raw
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        elif part == "method" and isinstance(child, str):
            child = node[part] = {"name": child}
        if not isinstance(child, dict):
            raise RecipeError(f"unknown key {key!r}: {'.'.join(parts[: depth + 1])!r} has no keys below it")
        node = child
    node[parts[-1]] = value
