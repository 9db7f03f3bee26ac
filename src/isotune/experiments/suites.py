"""The suites of the PSOFT paper as wholes: which recipes belong to one, and the means it reports."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import yaml

from isotune.experiments.budget import adapter_parameters
from isotune.experiments.loading import load, packaged
from isotune.experiments.recipe import Recipe, RecipeError, meant
from isotune.experiments.text import aligned

_BESIDE = ("mnli", "qqp", "all")
"""What is no task of the paper's and in no mean of its: two GLUE tasks, and all tasks of a suite after one training."""


def groups(suite: str) -> dict[str, list[str]]:
    """The recipes of a suite by group, as vtab's natural, specialised and structured; without groups all under ""."""
    counted = {
        name: str(raw.get("group", ""))
        for name, raw in packaged().items()
        if name.startswith(f"{suite}/") and name.removeprefix(f"{suite}/") not in _BESIDE
    }
    if not counted:
        raise ValueError(f"there is no suite {suite!r}")
    found: dict[str, list[str]] = {}
    for name, group in counted.items():
        found.setdefault(group, []).append(name)
    return found


def means(suite: str, scores: Mapping[str, float]) -> dict[str, float]:
    """The mean of each group all of whose recipes have a score, and as "mean" that of all groups if none is missing.

    `scores` holds a score for each recipe's name. The mean of vtab is the mean of its three groups' means, as the paper
    has it.
    """
    found = {
        group: fmean(scores[name] for name in names)
        for group, names in groups(suite).items()
        if all(name in scores for name in names)
    }
    if len(found) == len(groups(suite)):
        found["mean"] = fmean(found.values())
    found.pop("", None)
    return found


def listing(prefix: str = "") -> str:
    """The packaged recipes whose names begin with `prefix` as a table, of up to 100 columns for one suite.

    Those that need no network come first.

    Raises:
        RecipeError: there is none; the message says which suites there are.
    """
    known = packaged()
    chosen = [name for name in known if name.startswith(prefix)]
    if not chosen:
        suites = dict.fromkeys(name.partition("/")[0] + "/" * ("/" in name) for name in known)
        raise RecipeError(f"there is no recipe {prefix!r}; there are {', '.join(suites)}" + meant(prefix, known))
    lines = [("recipe", "data", "metric", "parameters")]
    recipes = {name: load(name) for name in chosen}
    offline = [name for name, recipe in recipes.items() if _is_offline(recipe)]
    recipes = {name: recipes[name] for name in dict.fromkeys([*offline, *chosen])}
    for name, recipe in recipes.items():
        count = adapter_parameters(recipe)
        lines.append((name, _source(recipe), recipe.metric, "" if count is None else f"{count:,}"))
    table = [line.rstrip() for line in aligned(lines, "<<<>")]
    models = dict.fromkeys(recipe.model for recipe in recipes.values())
    about = f"{len(chosen)} recipes" + (f" of {', '.join(models)}" if prefix else "")
    variants: dict[str, dict[str, None]] = {}
    for name in chosen:
        for variant in known[name].get("variants", ()):
            variants.setdefault(variant, {})[name.partition("/")[0] + "/" * ("/" in name)] = None
    told = [f"no network is needed for {', '.join(offline)}"] if offline else []
    told += [f"variant={variant} is for {', '.join(suites)}" for variant, suites in variants.items()]
    return "\n".join([*table, "", f"{about}; `isotune recipes NAME` prints one whole.", *told])


def whole(name: str) -> str:
    """A packaged recipe as the YAML that `isotune train` takes, below what it is."""
    raw = packaged()[name]
    text: str = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=100)
    return f"# isotune recipes {name} > mine.yaml; isotune train mine.yaml\n{text}".rstrip()


def _is_offline(recipe: Recipe) -> bool:
    """Whether data and model come with packages."""
    return recipe.data.builtin is not None and recipe.model.startswith("package:")


def _source(recipe: Recipe) -> str:
    hub = recipe.data.hub
    if recipe.data.builtin is not None:
        return recipe.data.builtin
    if hub is None:
        return "local files"
    if hub.files is not None:
        return hub.files.rpartition("/")[2]
    return f"{hub.name} {hub.config or ''}".strip()
