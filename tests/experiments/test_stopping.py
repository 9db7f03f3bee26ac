"""Stopping a search's run early: who goes on, and that a run which was killed is judged as one that was not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isotune.experiments.files import write_json
from isotune.experiments.stopping import SuccessiveHalving, stopping_point

pytest.importorskip("optuna")


def curve(*scores: float) -> list[tuple[int, float, float]]:
    """Scores after each quarter of 100 steps."""
    return [(25 * i, 25.0 * i, score) for i, score in enumerate(scores, 1)]


OTHERS = [curve(0.1, 0.5, 0.6), curve(0.2, 0.4, 0.5), curve(0.1, 0.3, 0.9)]


def test_the_better_half_goes_on() -> None:
    assert stopping_point(curve(0.0, 0.6, 0.1), OTHERS) is None
    assert stopping_point(curve(0.0, 0.45, 0.1), OTHERS) is None
    assert stopping_point(curve(0.9, 0.35, 0.9), OTHERS) == 1
    assert stopping_point(curve(0.0), OTHERS) is None  # not half done


def test_as_good_as_the_last_of_the_better_half_is_good_enough() -> None:
    assert stopping_point(curve(0.0, 0.4), OTHERS) is None


def test_of_a_loss_less_is_better() -> None:
    assert stopping_point(curve(0.0, 0.35), OTHERS, less_is_better=True) is None
    assert stopping_point(curve(0.0, 0.45), OTHERS, less_is_better=True) == 1


def test_the_first_of_a_search_is_never_stopped() -> None:
    assert stopping_point(curve(0.0, 0.0, 0.0), []) is None


def run(folder: Path, metric: str = "accuracy") -> Any:
    paths = []
    for number, points in enumerate(OTHERS):
        rows = [{"step": step, "validation_accuracy": score} for step, _, score in points]
        path = folder / f"{number}.json"
        write_json(path, {"curve": [*rows, {"step": 100, "validation_accuracy": 0.5}], "metric": metric})
        paths.append(path)
    failed = folder / "failed.json"
    write_json(failed, {"failed": "no memory"})
    return SimpleNamespace(recipe=SimpleNamespace(chosen_by=metric), earlier=(*paths, failed))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_hopeless_run_is_stopped_and_says_where(tmp_path: Path, resumed: bool) -> None:
    callback = SuccessiveHalving(run(tmp_path))
    state = SimpleNamespace(max_steps=100, global_step=0, log_history=[])
    control = SimpleNamespace(should_training_stop=False)
    for step, score in ((25, 0.3), (50, 0.2), (75, 0.9)):
        state.log_history += [{"step": step, "loss": 1.0}, {"step": step, "eval_accuracy": score}]
        state.global_step = step
        if not resumed or step == 75:
            callback.on_evaluate(None, state, control)
        assert control.should_training_stop == (callback.stopped is not None)
        assert (callback.stopped is not None) == (step == 75 if resumed else step >= 50)
    assert callback.stopped is not None
    assert (callback.stopped["step"], callback.stopped["of"]) == (50, 100)
    assert "Optuna" in callback.stopped["rule"]


def test_what_is_answered_in_words_is_judged_by_its_loss(tmp_path: Path) -> None:
    """Its score is known at the end alone."""
    paths = []
    for number, loss in enumerate((0.5, 0.6, 0.7)):
        paths.append(tmp_path / f"{number}.json")
        write_json(paths[-1], {"curve": [{"step": 50, "validation_loss": loss}]})
    for loss, lost in ((0.55, False), (0.65, True)):
        callback = SuccessiveHalving(
            SimpleNamespace(recipe=SimpleNamespace(chosen_by="accuracy"), earlier=tuple(paths))
        )  # type: ignore[arg-type]
        state = SimpleNamespace(max_steps=100, global_step=50, log_history=[{"step": 50, "eval_loss": loss}])
        callback.on_evaluate(None, state, SimpleNamespace(should_training_stop=False))
        assert (callback.stopped is not None) is lost
