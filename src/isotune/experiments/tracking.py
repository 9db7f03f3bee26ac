"""Showing the course of a training in TensorBoard, Weights & Biases or trackio, through transformers' own callbacks."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

from isotune.experiments import processes
from isotune.experiments.run import Run

_FOLDERS = ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR")
"""The variables by which these libraries are told where to write; there is no argument for it."""


@contextlib.contextmanager
def tracked(run: Run) -> Iterator[dict[str, Any]]:
    """While a run is trained, what its TrainingArguments are given to report it under its own name and folder."""
    names = run.settings.report_to
    given = {name: str(run.logs) for name in _FOLDERS if names and name not in os.environ}
    if "wandb" in names and processes.is_main():
        run.logs.mkdir(parents=True, exist_ok=True)  # it would write elsewhere, with a warning
    os.environ.update(given)
    try:
        yield {"report_to": names or "none", "run_name": f"{run.name} {run.title}"}
    finally:
        for name in given:
            del os.environ[name]
        for name in {"wandb", "trackio"} & {*names} if processes.is_main() else ():
            # Or the next run in this process would be added to this one. Where transformers has ended it already, or
            # it has not begun, trackio raises.
            with contextlib.suppress(RuntimeError):
                importlib.import_module(name).finish()
