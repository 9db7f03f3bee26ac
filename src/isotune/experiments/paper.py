"""The figures that the PSOFT paper reports, to stand beside ours and never among them.

Source: Wu, Hu, Min, Wang, Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, ICLR 2026, arXiv
2505.11235v3; the numbers are in `paper_results.json`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from isotune.experiments import registry
from isotune.experiments.files import packaged_object

MODELS = {"glue": "DeBERTaV3-base", "vtab": "ViT-B/16", "math": "LLaMA-3.2-3B", "commonsense": "LLaMA-3.1-8B"}
"""The pre-trained model of each of the paper's suites."""

_METHODS = {"OFTv2": "oft", "GOFTv2": "goft", "qGOFTv2": "qgoft", "FFT": "full"}
"""Ours for the paper's names of methods, where these are not the titles of ours."""
_TASKS = {"arce": "arceasy", "arcc": "arcchallenge", "obqa": "openbookqa", "cifar": "cifar100", "all": "avg"}
_NO_TASK = ("method", "params_M", "memory_GB")


@dataclass(frozen=True)
class PaperFigure:
    """One result of the paper."""

    suite: str
    """glue, vtab, math or commonsense."""
    task: str
    """The column's name in the paper's table."""
    method: str
    """With its rank or block size, as PSOFT r=46."""
    score: float
    """From 0 to 1: the paper's percentage, or its correlation times a hundred, divided by a hundred."""
    parameters: float
    """Trainable parameters, in millions."""
    memory: float | None
    """Peak memory of training, GB."""

    @property
    def model(self) -> str:
        """What it was trained on."""
        return MODELS[self.suite]


def results() -> dict[str, Any]:
    """All that is kept of the paper: results, hyperparameters, formulas and ablations, with its source."""
    return packaged_object("paper_results.json")


def source() -> str:
    """Where the figures come from, in a line."""
    return str(results()["source"])


def figures(task: str) -> dict[str, PaperFigure]:
    """What the paper reports for a task, by our name of the method; empty for a task that the paper does not have.

    A task is a recipe's name, such as glue/cola; case and punctuation do not count. SUITE/all is the paper's average.
    """
    suite, _, name = task.rpartition("/")
    own_names = {entry.title: entry.name for entry in registry.entries().values()} | _METHODS
    found: dict[str, PaperFigure] = {}
    for row in results()["results"].get(suite, ()):
        column = next((key for key in row if key not in _NO_TASK and _plain(key) == _plain(name)), None)
        own = own_names.get(row["method"].split()[0])
        if column is not None and own is not None and row[column] is not None:
            found[own] = PaperFigure(
                suite, column, row["method"], row[column] / 100, row["params_M"], row.get("memory_GB")
            )
    return found


def _plain(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _TASKS.get(plain, plain)
