"""One token through a layer with an update, and the gain of a layer, by Triton; run by test_kernels.py.

Not collected by itself, and with the variable TRITON_INTERPRET on the CPU, as block_kernels_on_device.py.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import pytest
import torch
from block_kernels_on_device import DEVICE, on_gpu
from torch import Tensor, nn

from helpers import as_trained, layers_of, relative_error
from isotune import evaluated_once
from isotune.adapter import kernels as nodes
from isotune.algebra import acceleration, decoding_kernels, gain_kernels, launching
from isotune.algebra.decoding_kernels import linear_with_update

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True)
def _kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(acceleration, "DEVICE", DEVICE)
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    assert not launching._failed


def random(*shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, device=DEVICE)).to(dtype)


@every_half
@pytest.mark.parametrize(("rank", "biased"), [(3, True), (48, False), (80, True)])
@pytest.mark.parametrize(("inner", "out"), [(24, 40), (300, 33), (4100, 6)])
def test_a_layer_with_its_update(inner: int, out: int, rank: int, biased: bool, dtype: torch.dtype) -> None:
    x, weight = random(1, inner, dtype=dtype), random(out, inner, dtype=dtype, size=inner**-0.5)
    down, up = random(rank, inner, dtype=dtype, size=inner**-0.5), random(out, rank, dtype=dtype)
    bias = random(out, dtype=dtype) if biased else None
    assert decoding_kernels.can_multiply(x, weight, bias, down, up)
    found = linear_with_update(x, weight, bias, down, up)
    assert found.dtype == dtype
    coordinates = (x.double() @ down.double().T).to(dtype)
    exact = x.double() @ weight.double().T + coordinates.double() @ up.double().T + (0 if bias is None else bias)
    # A coordinate, of size 1 as the entries of up are, may have been rounded to the other side.
    limit = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=4 * limit * rank**0.5)


def test_rows_with_a_stride() -> None:
    wide = random(3, 200, dtype=torch.bfloat16)
    weight, down, up = (random(*shape, dtype=torch.bfloat16) for shape in ((30, 64), (16, 64), (30, 16)))
    x = wide[1:2, 50:114]
    found = linear_with_update(x, weight, None, down, up)
    assert torch.equal(found, linear_with_update(x.clone(), weight, None, down, up))
    apart = random(30, 128, dtype=torch.bfloat16)[:, :64].copy_(weight)
    assert torch.equal(found, linear_with_update(x, apart, None, down, up))


def test_what_they_do_not_take() -> None:
    x, weight, down, up = (random(*s, dtype=torch.bfloat16) for s in ((1, 64), (32, 64), (16, 64), (32, 16)))
    can = decoding_kernels.can_multiply
    bias = random(32, dtype=torch.bfloat16)
    assert can(x, weight, None, down, up)
    assert can(x, nn.Parameter(weight), nn.Parameter(bias), down, up)
    assert not can(x, weight, bias.float(), down, up)
    assert not can(random(2, 64, dtype=torch.bfloat16), weight, None, down, up)
    assert not can(x[:0], weight, None, down, up)
    assert not can(x.float(), weight.float(), None, down.float(), up.float())
    assert not can(x, weight.half(), None, down, up)
    assert not can(x, weight.t().contiguous().t(), None, down, up)
    assert not can(x, weight, None, random(520, 64, dtype=torch.bfloat16), random(32, 520, dtype=torch.bfloat16))
    with torch.enable_grad():
        assert not can(x, weight, None, down, up)


def decoder(method: str, bias: bool) -> Any:
    """Two layers in bfloat16, one wider than its input and one narrower."""
    base = nn.Sequential(nn.Linear(48, 96, bias=bias), nn.Tanh(), nn.Linear(96, 48, bias=bias)).bfloat16()
    return as_trained(method, base.to(DEVICE), "0", "2").to(DEVICE)


@pytest.mark.parametrize(("method", "bias"), [("psoft", True), ("lora_xs", False), ("oplora", True)])
def test_a_model_takes_them_for_one_token(method: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Tensor, Tensor]] = []

    def noted(x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor) -> Any:
        taken.append((down, up))
        return linear_with_update(x, weight, bias, down, up)

    model, x = decoder(method, bias), random(1, 1, 48, dtype=torch.bfloat16)
    monkeypatch.setattr(acceleration, "DEVICE", "none")
    expected = model(x)
    monkeypatch.setattr(acceleration, "DEVICE", DEVICE)
    monkeypatch.setattr(decoding_kernels, "linear_with_update", noted)
    with evaluated_once(model):
        first, again = model(x), model(x)
        assert len(taken) == 4
        # What the update was multiplied into is kept for as long as the parameters stay.
        assert all(map(operator.is_, itertools.chain(*taken[:2]), itertools.chain(*taken[2:])))
        layers_of(model)[0].set_scale("default", 0.5)
        half = model(x)
    assert first.shape == expected.shape
    assert relative_error(first, expected) < 2e-2
    assert torch.equal(first, again)
    assert relative_error(half, expected) > 1e-3
    layers_of(model)[0].set_scale("default", 1.0)
    assert torch.equal(model(x), first)  # outside of the block nothing is kept, and nothing differs
    assert all(adapter.given.made is None for layer in layers_of(model) for adapter in layer.isotune_operator.values())
    for layer in layers_of(model):
        for parameter in layer.isotune_operator.parameters():
            parameter.mul_(2)
    assert relative_error(model(x), first) > 1e-3
    with torch.enable_grad():
        assert model(x).requires_grad
    assert model(x.expand(2, 1, 48)).shape == (2, 1, 48)
    assert len(taken) == 10


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "out"), [(1, 5), (64, 32), (150, 70)])
def test_the_gradient_of_a_gain(tokens: int, out: int, dtype: torch.dtype) -> None:
    rows, gradient = random(tokens, out, dtype=dtype), random(tokens, out + 8, dtype=dtype)[:, :out]
    gain = random(out, dtype=torch.float32)
    assert gain_kernels.can_scale(rows, gradient, gain)
    of_gain = (rows.double() * gradient.double()).sum(0)
    of_rows = gradient.double() * gain.double()
    found = gain_kernels.gain_backward(rows, gradient, gain)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), of_gain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.double(), of_rows, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not gain_kernels.can_scale(rows, gradient, gain.double())
    assert not gain_kernels.can_scale(rows.double(), gradient.double(), gain)


def test_a_layer_takes_it_for_its_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    inner = gain_kernels.gain_backward
    monkeypatch.setattr(gain_kernels, "gain_backward", lambda *given: taken.append(1) or inner(*given))
    rows, gradient, gain = (
        random(20, 12, dtype=torch.float32),
        random(20, 12, dtype=torch.float32),
        random(12, dtype=torch.float32),
    )
    of_rows, of_gain = nodes._gain_backward(rows.clone(), gradient, gain)
    assert taken == [1]
    monkeypatch.setattr(acceleration, "DEVICE", "none")
    for found, expected in zip((of_rows, of_gain), nodes._gain_backward(rows, gradient, gain), strict=True):
        torch.testing.assert_close(found, expected)
    assert taken == [1]


@on_gpu
def test_captured_in_a_graph_without_a_wait() -> None:
    model, x = decoder("psoft", True), random(1, 48, dtype=torch.bfloat16)
    with evaluated_once(model):
        model(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        graph.replay()
        assert torch.equal(captured, expected)
