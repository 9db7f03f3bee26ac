"""What an optimiser keeps for an adapter that moves is found in the optimisers inside it, or the move is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from helpers import MOVING, Chain, assert_unchanged, configured, snapshot, trainable
from isotune import get_peft_model
from isotune.moving import MovingSchedule
from isotune.moving.stores import stores_of

RATE = 0.05


class Sam(Optimizer):
    """As SAM is written: it keeps where a parameter was, and the optimiser inside it everything else."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = AdamW(self.param_groups, lr=RATE)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old_p"] = parameter.detach().clone()
        self.base_optimizer.step(closure)


class Both:
    """Two optimisers in one, which is of no class of torch's."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.optimizers = [AdamW(parameters[0::2], lr=RATE), AdamW(parameters[1::2], lr=RATE)]
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]

    def step(self) -> None:
        for one in self.optimizers:
            one.step()


class Named(Optimizer):
    """It knows parameters by their place."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for place, parameter in enumerate(self.param_groups[0]["params"]):
            state: Any = self.state
            moment = state.setdefault(str(place), torch.zeros_like(parameter))
            parameter -= RATE * moment.mul_(0.9).add_(parameter.grad)


class Joint(Named):
    """It keeps everything under its first parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        first, *_ = parameters = self.param_groups[0]["params"]
        moments = self.state[first].setdefault("all", [torch.zeros_like(p) for p in parameters])
        for parameter, moment in zip(parameters, moments, strict=True):
            parameter -= RATE * moment.mul_(0.9).add_(parameter.grad)


def accelerated(parameters: list[nn.Parameter]) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_optimizer(AdamW(parameters, lr=RATE))


WRAPPED: dict[str, Any] = {
    "zero": lambda parameters: ZeroRedundancyOptimizer(parameters, AdamW, lr=RATE),
    "sam": Sam,
    "both": Both,
    "accelerate": accelerated,
}


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(method: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Chain(12, 20, 12), configured(method))


def inputs() -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(4))


def backward(model: nn.Module, head: nn.Module | None = None) -> Tensor:
    y = model(inputs()) if head is None else head(model(inputs()))
    loss = (y - torch.linspace(-1, 1, y.numel()).view(y.shape)).square().mean()
    loss.backward()
    return loss


def trained(method: str, build: Any, treatment: Any) -> Tensor:
    """The output after seven steps, with moves after the third and the sixth."""
    model = adapted(method)
    optimizer, schedule = build(list(trainable(model).values())), MovingSchedule(3, optimizer_state=treatment)
    for _ in range(7):
        backward(model)
        optimizer.step()
        schedule.step(model, optimizer)
        model.zero_grad()
    assert [move.done for move in schedule.history] == [3, 6]
    return model(inputs()).detach()


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize(
    ("name", "treatment"),
    [
        (name, treatment)
        for name in WRAPPED
        for treatment in ("reset", "project", "keep")
        if (name, treatment) != ("sam", "project")
    ],
)
def test_an_optimiser_inside_another_is_treated_as_it_would_be_alone(
    method: str, name: str, treatment: str, request: pytest.FixtureRequest
) -> None:
    if name == "zero":
        request.getfixturevalue("group_of_one")
    alone = trained(method, lambda parameters: AdamW(parameters, lr=RATE), treatment)
    torch.testing.assert_close(trained(method, WRAPPED[name], treatment), alone, rtol=1e-5, atol=1e-6)


def test_what_a_wrapper_keeps_itself_is_neither_missed_nor_projected() -> None:
    model = adapted("psoft")
    optimizer = Sam(list(trainable(model).values()))
    backward(model)
    optimizer.step()
    assert [len(store) for store in stores_of(optimizer)] == [2 * 3, 2 * 3]
    refused(model, optimizer, "has 'old_p'", "project")
    MovingSchedule(1).step(model, optimizer)
    assert not any(stores_of(optimizer))


def test_an_interrupted_exchange_puts_back_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("psoft")
    optimizer = Sam(list(trainable(model).values()))
    backward(model)
    optimizer.step()
    before = [dict(store) for store in stores_of(optimizer)]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("isotune.moving.boundary.update_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MovingSchedule(1).step(model, optimizer)
    for store, then in zip(stores_of(optimizer), before, strict=True):
        assert store.keys() == then.keys()
        assert all(store[parameter] is state for parameter, state in then.items())


def refused(model: nn.Module, optimizer: Any, match: str, treatment: Any) -> None:
    before, states = snapshot(model), [dict(store) for store in stores_of(optimizer)]
    buffers = dict(model.named_buffers())
    with pytest.raises(ValueError, match=match):
        MovingSchedule(1, optimizer_state=treatment).step(model, optimizer)
    assert_unchanged(model, before)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert all(then.keys() == store.keys() for then, store in zip(states, stores_of(optimizer), strict=True))


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("first", ["head", "adapter"])
@pytest.mark.parametrize("kind", ["lbfgs", "named", "joint"])
def test_a_state_without_a_part_for_each_parameter_is_refused(method: str, first: str, kind: str) -> None:
    model, head = adapted(method), nn.Linear(12, 3)
    parts = [list(head.parameters()), list(trainable(model).values())]
    parameters = [p for part in (parts if first == "head" else parts[::-1]) for p in part]
    optimizer = {"lbfgs": LBFGS, "named": Named, "joint": Joint}[kind](parameters)
    match = "one history for all its parameters" if kind == "lbfgs" else "nothing is kept under these parameters"

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, head)

    if kind == "lbfgs":
        refused(model, optimizer, match, "reset")  # before its first step
    backward(model, head)
    optimizer.step(closure)
    if (kind, first) != ("joint", "adapter"):  # what is kept under a parameter of the adapter is reset as a whole
        refused(model, optimizer, match, "reset")
    refused(model, optimizer, "has 'all'" if (kind, first) == ("joint", "adapter") else match, "project")
    assert MovingSchedule(1, optimizer_state="keep").step(model, optimizer) is not None
    backward(model, head)
    optimizer.step(closure)


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("treatment", ["reset", "project"])
def test_an_optimiser_that_keeps_nothing_for_the_adapter_moves(method: str, treatment: Any) -> None:
    """It has not stepped, or has no moments, or those of a head alone, which was trained before or as another group."""
    for case in ("new", "plain", "head before", "head's momentum"):
        model, head = adapted(method), nn.Linear(12, 3)
        own = list(trainable(model).values())
        groups: list[Any] = [{"params": [*head.parameters()], "momentum": 0.9}, {"params": own, "momentum": 0.0}]
        optimizer: Any = SGD(groups, lr=RATE) if case == "head's momentum" else AdamW([*head.parameters(), *own])
        optimizer = SGD(own, lr=RATE) if case == "plain" else optimizer
        if case == "head before":
            model.requires_grad_(False)
        if case != "new":
            backward(model, head)
            optimizer.step()
        if case == "head before":
            optimizer.zero_grad()
            for parameter in own:
                parameter.requires_grad_()
        kept = len(optimizer.state)
        assert kept == (2 if case.startswith("head") else 0)
        assert MovingSchedule(1, optimizer_state=treatment).step(model, optimizer) is not None
        assert len(optimizer.state) == kept


def test_a_state_in_eight_bits_is_reset() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = adapted("psoft")
    optimizer = bitsandbytes.optim.AdamW8bit(list(trainable(model).values()), lr=RATE, min_8bit_size=1)
    backward(model)
    try:
        optimizer.step()
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes' optimisers do not run here: {error}")
    assert optimizer.state
    refused(model, optimizer, "whose state has 'state1'", "project")
    MovingSchedule(1).step(model, optimizer)
    assert not optimizer.state
    backward(model)
    optimizer.step()


class Loaded(Both):
    """As ZeroRedundancyOptimizer after load_state_dict: beside the states inside, none for what others keep."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.state: dict[Any, Any] = dict.fromkeys(parameters)


@pytest.mark.parametrize("treatment", ["reset", "project"])
def test_what_other_processes_keep_is_passed_over(treatment: str) -> None:
    model = adapted("psoft")
    optimizer = Loaded(list(trainable(model).values()))
    schedule = MovingSchedule(2, optimizer_state=treatment)
    for _ in range(4):
        backward(model)
        optimizer.step()
        schedule.step(model, optimizer)
        for parameter in trainable(model).values():
            parameter.grad = None
    assert set(optimizer.state.values()) == {None}


def test_a_step_that_is_skipped_after_a_move_is_no_hidden_state() -> None:
    """As a GradScaler skips steps; the head has kept its state, and the adapter's was reset."""
    model, head = adapted("psoft"), nn.Linear(12, 3)
    own = list(trainable(model).values())
    optimizer, schedule = AdamW([*own, *head.parameters()], lr=RATE), MovingSchedule(1)
    for stepping in (True, False, True):
        backward(model, head)
        if stepping:
            optimizer.step()
        schedule.step(model, optimizer)
        if not stepping:
            assert not any(parameter in optimizer.state for parameter in own)
