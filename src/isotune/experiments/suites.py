"""The suites of the PSOFT paper as wholes: which recipes belong to one, and the means it reports."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from isotune.experiments.budget import adapter_parameters
from isotune.experiments.loading import load, packaged
from isotune.experiments.recipe import Recipe
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


def listing() -> str:
    """The packaged recipes as a table: name, model, data, metric, parameters of the adapter, and description."""
    lines = [("recipe", "model", "data", "metric", "adapter", "description")]
    for name in packaged():
        recipe = load(name)
        count = adapter_parameters(recipe)
        shown = "" if count is None else f"{count:,}"
        lines.append((name, recipe.model, _source(recipe), recipe.metric, shown, recipe.description))
    return "\n".join(line.rstrip() for line in aligned(lines, "<<<<><"))


def _source(recipe: Recipe) -> str:
    hub = recipe.data.hub
    if recipe.data.builtin is not None:
        return recipe.data.builtin
    if hub is None:
        return "local files"
    if hub.files is not None:
        return hub.files.rpartition("/")[2]
    return f"{hub.name} {hub.config or ''}".strip()
