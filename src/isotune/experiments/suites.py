"""The suites of the PSOFT paper as wholes: which recipes belong to one, and the means it reports."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from isotune.experiments.recipe import packaged

SIX = ("cola", "stsb", "rte", "mrpc", "sst2", "qnli")
"""The GLUE tasks of the paper; mnli and qqp are ours to run, and in no mean of the paper's."""


def groups(suite: str) -> dict[str, list[str]]:
    """The recipes of a suite by group, as vtab's natural, specialised and structured; without groups all under "".

    Raises ValueError for a name that is no suite of the paper.
    """
    counted = {
        name: str(raw.get("group", ""))
        for name, raw in packaged().items()
        if name.startswith(f"{suite}/") and (suite != "glue" or name.removeprefix("glue/") in SIX)
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
