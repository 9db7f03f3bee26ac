"""Passes that Ctrl-C leaves, and parameters that change within one: the parameters of now are computed with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isotune
from helpers import (
    CHECKPOINTING,
    FEW,
    LORA,
    QUICK,
    WITH_LORA,
    Chain,
    afresh,
    as_trained,
    move,
    relative_error,
    trainable,
)

pytestmark = [
    pytest.mark.parametrize("method", WITH_LORA),
    pytest.mark.covered(method=FEW),
]

HERE = str(Path(isotune.__file__).parent)


class WithHead(nn.Module):
    """A backbone with all the adapted layers, and a head after it, as in a language model."""

    def __init__(self, checkpointing: str | None = None) -> None:
        super().__init__()
        self.backbone, self.head = Chain(checkpointing=checkpointing), nn.Linear(12, 5)
        nn.init.ones_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def in_place(model: nn.Module) -> None:
    move(model, seed=9)


def without_a_trace(model: nn.Module) -> None:
    """As an exponential moving average swaps its parameters in."""
    for parameter in trainable(model).values():
        parameter.data.add_(0.2 * torch.ones_like(parameter))


WRITES: list[Callable[[nn.Module], None]] = [in_place, without_a_trace]


def assert_of_now(model: Any) -> None:
    """The whole model, its backbone, a part of that and each layer give what they must, with and without gradients."""
    right = afresh(model, WithHead()).get_base_model()
    base, x = model.get_base_model(), torch.randn(4, 12)
    parts: dict[str, tuple[Callable[[Any], Any], Tensor]] = {
        "a layer": (lambda m: m.backbone.layers[1], torch.randn(4, 24)),
        "the first layer": (lambda m: m.backbone.layers[0], x),
        "a part": (lambda m: nn.Sequential(*m.backbone.layers[1:]), torch.randn(4, 24)),
        "the backbone": (lambda m: m.backbone, x),
        "the model": (lambda m: m, x),
    }
    for name, (part, given) in parts.items():
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found, expected = part(base)(given), part(right)(given)
            assert relative_error(found.detach(), expected.detach()) < 1e-5, (name, grad)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("where", ["backbone.layers.0", "backbone.layers.2", "head"])
def test_ctrl_c_leaves_nothing_of_the_pass(method: str, where: str, write: Any, grad: bool) -> None:
    model = as_trained(method, WithHead())
    handle = model.get_base_model().get_submodule(where).register_forward_pre_hook(interrupt)
    with torch.set_grad_enabled(grad), pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 12))
    handle.remove()
    write(model)
    assert_of_now(model)


@pytest.mark.xfail(strict=True, reason="torch runs no hook after Ctrl-C, and this model is called by no PeftModel")
def test_a_layer_alone_after_ctrl_c_in_a_bare_model(method: str) -> None:
    """What was written through `data` since, and no pass of the whole model has seen yet."""
    if method == LORA:
        pytest.xfail("the control is right")
    model, x = as_trained(method, WithHead()), torch.randn(4, 24)
    base = model.get_base_model()
    base.backbone.layers[2].register_forward_pre_hook(interrupt)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            base(torch.randn(3, 12))
        without_a_trace(model)
        right = afresh(model, WithHead()).get_base_model()
        assert relative_error(base.backbone.layers[1](x), right.backbone.layers[1](x)) < 1e-5


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_ctrl_c_at_any_line(method: str, write: Any, grad: bool) -> None:
    """A pass is left before a line of isotune's own code, at lines all over it."""
    if method == LORA:
        pytest.skip("runs no line of isotune's")

    def run(model: Any, at: int) -> int:
        """Run a pass up to that line; returns how many lines ran."""
        lines = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.startswith(HERE):
                return None
            if event == "line":
                if lines == at:
                    raise KeyboardInterrupt
                lines += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            model(torch.randn(3, 12))
        finally:
            sys.settrace(before)
        return lines

    with torch.set_grad_enabled(grad):
        count = run(as_trained(method, WithHead()), -1)
        for at in range(0, count, max(1, count // (3 if QUICK else 24))):
            model = as_trained(method, WithHead())
            with pytest.raises(KeyboardInterrupt):
                run(model, at)
            write(model)
            with torch.enable_grad():
                assert_of_now(model)


def test_training_goes_on_after_ctrl_c(method: str) -> None:
    model = as_trained(method, WithHead())
    handle = model.get_base_model().head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 12))
    handle.remove()
    backbone, x, losses = model.get_base_model().backbone, torch.randn(3, 12), []
    for _ in range(4):
        loss = backbone(x).square().mean()
        loss.backward()
        losses.append(float(loss))
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.sub_(0.01 * parameter.grad)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4
    assert_of_now(model)


@pytest.mark.parametrize("mode", CHECKPOINTING[1:])
@pytest.mark.parametrize("write", WRITES)
def test_ctrl_c_while_a_part_is_computed_again(method: str, mode: str, write: Any) -> None:
    model = as_trained(method, WithHead(mode))
    y, calls = model(torch.randn(3, 12).requires_grad_()), []

    def second(*_: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    handle = model.get_base_model().backbone.layers[1].register_forward_pre_hook(second)
    with pytest.raises(KeyboardInterrupt):
        y.sum().backward()
    handle.remove()
    assert calls
    write(model)
    model.get_base_model().backbone.checkpointing = None
    assert_of_now(model)


class TrainsItself(nn.Module):
    """Trains on its input before it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.steps = Chain(), 0

    def forward(self, x: Tensor, write: Any = None) -> Tensor:
        for _ in range(self.steps):
            with torch.enable_grad():
                self.net(x).square().sum().backward()
            if write is not None:
                write(self)
                continue
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.02 * parameter.grad)
                        parameter.grad = None
        return self.net(x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", [None, *WRITES])
def test_a_step_inside_the_models_own_forward(method: str, write: Any, grad: bool) -> None:
    model, x = as_trained(method, TrainsItself()), torch.randn(4, 12)
    before = model(x).detach()
    model.get_base_model().steps = 2
    with torch.set_grad_enabled(grad):
        found = model(x, write=write)
    assert relative_error(found.detach(), before) > 1e-3
    assert relative_error(found.detach(), afresh(model, TrainsItself())(x).detach()) < 1e-5


class Tied(nn.Module):
    """Calls its layers itself, a step between two calls of one: nothing but them contains all adapted layers."""

    def __init__(self, write: Any = None) -> None:
        super().__init__()
        self.layers, self.write = nn.ModuleList(nn.Linear(12, 12) for _ in range(2)), write
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x))
        if self.write is not None:
            self.write(self)
        return torch.cat([x, self.layers[1](self.layers[0](x.detach()))])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_parameters_that_change_between_two_layers_of_a_pass(method: str, write: Any, grad: bool) -> None:
    """What leaves a trace is seen at once."""
    if write is without_a_trace and method != LORA:
        pytest.skip("what leaves no trace is seen by the next pass, as the guide says")
    model, x = as_trained(method, Tied()), torch.randn(4, 12)
    model.get_base_model().write = write
    with torch.set_grad_enabled(grad):
        found = model(x).detach()
    model.get_base_model().write = None
    twin = afresh(model, Tied()).get_base_model()
    assert relative_error(found[4:], twin.layers[1](twin.layers[0](found[:4])).detach()) < 1e-5
