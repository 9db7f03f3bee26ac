"""What schedules know of each model: several take turns, and a schedule is copied and pickled."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from helpers import MOVING, Chain, configured, trainable
from isotune import get_peft_model
from isotune.moving import MovingSchedule, UoraSchedule

METHODS = (*MOVING, "uora")


def schedule_of(method: str) -> Any:
    return UoraSchedule(threshold=0.1, weight=0.5, every=3) if method == "uora" else MovingSchedule(3)


def model_of(method: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    options = {"d_initial": 1.0} if method == "uora" else {}
    return get_peft_model(Chain(12, 20, 12, seed=seed), configured(method, **options))


def step(schedule: Any, model: nn.Module, **given: Any) -> Any:
    return schedule.step(model, torch.optim.SGD(trainable(model).values(), lr=0.1), **given)


@pytest.mark.parametrize("method", METHODS)
def test_models_that_take_turns_are_counted_each(method: str) -> None:
    schedule, models = schedule_of(method), [model_of(method), model_of(method, 1)]
    found = [[step(schedule, model) is not None for model in models] for _ in range(7)]
    assert found == [[count % 3 == 0] * 2 for count in range(1, 8)]
    assert [one.done for one in schedule.history] == [3, 3, 6, 6]


@pytest.mark.parametrize("method", METHODS)
def test_a_count_that_begins_anew_on_a_moved_adapter_is_refused(method: str) -> None:
    model = model_of(method)
    assert step(schedule_of(method), model, done=7).number == 2
    with pytest.raises(ValueError, match=r"done=1, but 'default' has passed 2 boundaries, with every=3 after 6 steps"):
        step(schedule_of(method), model, done=1)
    going_on = schedule_of(method)
    assert step(going_on, model, done=0) is None  # as loops do that choose a subspace before the first step
    assert [step(going_on, model) is None for _ in range(3)] == [True, True, False]
    assert step(schedule_of(method), model, done=9) is None  # saved and resumed right after this boundary
    assert step(schedule_of(method), model, done=12).number == 4


def test_a_model_that_is_gone_is_not_kept() -> None:
    schedule = MovingSchedule(3)
    step(schedule, model_of("psoft"))
    gc.collect()
    assert not schedule._counted
    assert not schedule._read


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_that_has_stepped_is_copied_and_pickled(method: str) -> None:
    schedule, model = schedule_of(method), model_of(method)
    assert [step(schedule, model) is None for _ in range(5)] == [True, True, False, True, True]
    copied, pickled = copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))
    for again in (copied, pickled):
        assert [one.done for one in again.history] == [3]
        assert (again.every, again.unit, again.adapter) == (3, "step", "default")
    other = copy.deepcopy(model)
    assert step(pickled, other, done=6).number == 2  # elsewhere, where it must be told what is finished
    assert [step(pickled, other) is None for _ in range(3)] == [True, True, False]
    assert step(copied, model).number == 2
