"""A model that several threads call while its parameters are exchanged: whatever the order, nothing old stays."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isotune
from helpers import EVERY_METHOD, FEW, QUICK, Chain, as_trained, move, relative_error, trainable

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(method=FEW),
]

HERE = str(Path(isotune.__file__).parent)


class Held(threading.Thread):
    """Runs a function, but waits before its line number `at` inside isotune, if given, until `go` is set."""

    def __init__(self, function: Callable[[], Any], at: int | None = None) -> None:
        super().__init__(daemon=True)
        self.function, self.at, self.lines = function, at, 0
        self.reached, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        if self.at is not None:
            sys.settrace(self.trace)
        try:
            self.function()
        except BaseException as error:
            self.error = error
        finally:
            sys.settrace(None)
            self.reached.set()

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        if event == "line":
            if self.lines == self.at:
                self.reached.set()
                self.go.wait(10)
            self.lines += 1
        return self.trace


class Served:
    """An adapted model, two sets of its parameters, and what it answers with each."""

    def __init__(self, method: str, grad: bool) -> None:
        self.model, self.x, self.grad = as_trained(method, Chain(12, 12, 12)), torch.randn(2, 12), grad
        self.parameters = list(trainable(self.model).values())
        self.sets: list[list[Tensor]] = []
        self.answers: list[Tensor] = []
        for seed in (3, 4):
            move(self.model, seed)
            self.sets.append([p.detach().clone() for p in self.parameters])
            self.answers.append(self.read())

    def read(self) -> Tensor:
        with torch.set_grad_enabled(self.grad):
            return self.model(self.x).detach()

    @torch.no_grad()
    def swap(self, which: int) -> None:
        torch._foreach_copy_(self.parameters, self.sets[which])


@pytest.mark.parametrize("grad", [True, False])
def test_a_swap_while_a_reader_is_held_anywhere(method: str, grad: bool) -> None:
    """The reader stops before a line, a swap and another reader pass, and it goes on."""
    served = Served(method, grad)
    served.swap(0)
    thread = Held(served.read, -1)  # which counts them
    thread.join()
    for at in range(0, thread.lines, max(1, thread.lines // (8 if QUICK else 60))):
        served.swap(1)
        served.read()
        served.swap(0)
        slow = Held(served.read, at)
        slow.reached.wait(10)
        served.swap(1)
        fast = Held(served.read)
        fast.join(0.05)
        slow.go.set()
        for one in (slow, fast):
            one.join(10)
            assert one.error is None, at
        assert relative_error(served.read(), served.answers[1]) < 1e-5, at


@pytest.mark.slow
def test_two_readers_held_anywhere_raise_nothing(method: str) -> None:
    served = Served(method, False)
    thread = Held(served.read, -1)
    thread.join()
    stride = max(1, thread.lines // (4 if QUICK else 12))
    for at in range(0, thread.lines, stride):
        for other in range(0, thread.lines, stride):
            served.swap(0)
            served.read()
            first = Held(served.read, at)
            first.reached.wait(10)
            served.swap(1)
            second = Held(served.read, other)
            second.reached.wait(0.05)
            first.go.set()
            second.go.set()
            for one in (first, second):
                one.join(10)
                assert one.error is None, (at, other)
            assert relative_error(served.read(), served.answers[1]) < 1e-5, (at, other)


@pytest.mark.slow
def test_training_in_one_thread_and_evaluation_in_others(method: str) -> None:
    """The trained model is that of a training alone."""
    from concurrent.futures import ThreadPoolExecutor

    def train(model: Any, x: Tensor) -> list[float]:
        optimizer, losses = torch.optim.SGD(trainable(model).values(), lr=0.05), []
        for _ in range(6):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    x = torch.randn(4, 12)
    expected = train(as_trained(method), x)
    model, stop = as_trained(method), threading.Event()

    def evaluate() -> None:
        while not stop.is_set():
            with torch.no_grad():
                assert torch.isfinite(model(x)).all()

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(evaluate) for _ in range(2)]
        try:
            found = train(model, x)
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert found == pytest.approx(expected, rel=1e-5)
