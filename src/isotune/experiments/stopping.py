"""Stopping a run of a search early where it is hopeless beside those before it: successive halving, by Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from isotune.experiments.files import read_object
from isotune.experiments.recipe import LESS_IS_BETTER
from isotune.experiments.records import record_of
from isotune.experiments.run import Run

RUNG = 50
"""The percentage of its steps after which a run must be among the better half."""
_RULE = f"successive halving (Optuna): not in the better half of the search's runs at {RUNG} % of the steps"

Points = Sequence[tuple[int, float, float]]
"""Scores on validation before the end: the step, its percentage of all steps, and the score."""


class SuccessiveHalving(TrainerCallback):  # type: ignore[misc]
    """Stops a run that is not in the better half of the search's earlier runs, itself included, at RUNG.

    Those that were stopped there count among the others. It keeps nothing of its own, so that a resumed run is judged
    as an uninterrupted one.

    Source: Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943, in the form of Li et al., arXiv 1810.05934.
    """

    def __init__(self, run: Run) -> None:
        self.metric = run.recipe.chosen_by
        self.earlier = [record for path in run.earlier if not (record := record_of(read_object(path), path)).failed]
        self.stopped: dict[str, Any] | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        of = state.max_steps
        # What is answered in words is scored at the end alone, and judged by its loss on the way.
        metric = self.metric if any(f"eval_{self.metric}" in row for row in state.log_history) else "loss"
        own = _points(state.log_history, f"eval_{metric}", of)
        others = [_points(record.curve, f"validation_{metric}", of) for record in self.earlier]
        # Of all its points, since a run that was killed after the decisive one goes on from there.
        point = stopping_point(own, others, less_is_better=metric in LESS_IS_BETTER)
        if point is not None:
            self.stopped = {"step": own[point][0], "of": of, "rule": _RULE}
            control.should_training_stop = True


def _points(rows: Sequence[Mapping[str, float]], key: str, of: int) -> Points:
    return [(int(row["step"]), 100 * row["step"] / of, row[key]) for row in rows if key in row and row["step"] < of]


def stopping_point(own: Points, others: Sequence[Points], *, less_is_better: bool = False) -> int | None:
    """The first of its points at which a run is to be stopped, beside others that went before it, or None."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=RUNG, reduction_factor=2)
    study = optuna.create_study(direction="minimize" if less_is_better else "maximize", pruner=pruner)
    for points in (*others, own):
        trial = study.ask()
        for number, (_, percent, value) in enumerate(points):
            trial.report(value, int(percent))
            if trial.should_prune() and points is own:
                return number
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return None
