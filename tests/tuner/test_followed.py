"""Passes that torch follows leave nothing behind, and what was evaluated before does not stand in for what they do."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from helpers import EVERY_METHOD, FEW, HOSTS_OF_12, as_trained, relative_error, seeded_host

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(method=FEW, host=("linear", "conv2d", "embedding")),
]


def made(method: str, host: str) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    """A model as if trained, an input and the adapter's parameters."""
    model: nn.Module = as_trained(method, seeded_host(host), "layer")
    return model, HOSTS_OF_12[host][1](), {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def faked(model: nn.Module, x: Any, parameters: dict[str, torch.Tensor]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))


def mapped(model: nn.Module, x: Any, parameters: dict[str, torch.Tensor]) -> None:
    several = {name: torch.stack([one, one + 1]) for name, one in parameters.items()}
    vmap(lambda given: functional_call(model, given, (x,)))(several)


def traced(model: nn.Module, x: Any, parameters: dict[str, torch.Tensor]) -> None:
    make_fx(model)(x)


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("follow", [faked, mapped, traced])
@pytest.mark.parametrize("used", [True, False])
@torch.no_grad()
def test_a_followed_pass_leaves_nothing_behind(method: str, host: str, follow: Any, used: bool) -> None:
    model, x, parameters = made(method, host)
    expected = as_trained(method, seeded_host(host), "layer")(x)
    if used:
        model(x)
    with contextlib.suppress(Exception):  # not every method can be followed by every mode
        follow(model, x, parameters)
    for _ in range(2):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("host", HOSTS_OF_12)
@torch.no_grad()
def test_an_earlier_pass_hides_no_tangent(method: str, host: str) -> None:
    model, x, parameters = made(method, host)
    directions = {name: torch.randn_like(one) for name, one in parameters.items()}

    def tangent() -> torch.Tensor | None:
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(one, directions[name]) for name, one in parameters.items()}
            try:
                found: torch.Tensor | None = forward_ad.unpack_dual(functional_call(model, duals, (x,))).tangent
            except (NotImplementedError, RuntimeError):
                return None  # said, and nothing computed
            assert found is not None
            return found.clone()

    first = tangent()
    model(x)
    again = tangent()
    assert (first is None) == (again is None)
    if first is not None and again is not None:
        torch.testing.assert_close(again, first)


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_leaves_float64_alone_as_torch_does(method: str, host: str, dtype: torch.dtype) -> None:
    model, x, _ = made(method, host)
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    expected = model(x)
    with torch.autocast("cpu", dtype):
        found = model(x)
    assert found.dtype == torch.float64
    assert relative_error(found, expected) < 1e-12


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: float(relative_error(found[name], one)) for name, one in expected.items() if one.norm() > 1e-9}


@pytest.mark.parametrize("host", HOSTS_OF_12)
def test_the_transforms_of_torch_func_give_what_autograd_gives(method: str, host: str) -> None:
    """For gradients of single samples, as of differential privacy, and for derivatives along a direction."""
    model, x, parameters = made(method, host)

    def output(given: dict[str, torch.Tensor], x: Any) -> torch.Tensor:
        result: torch.Tensor = functional_call(model, given, (x,))
        return result

    def scored(result: torch.Tensor) -> torch.Tensor:  # by what a rotation changes, too
        return (result - torch.arange(result[0].numel()).view(result[0].shape).cos()).pow(4).mean()

    def loss(given: dict[str, torch.Tensor], x: Any) -> torch.Tensor:
        return scored(output(given, x))

    def gradients(x: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        scored(model(x)).backward()
        return {name: model.get_parameter(name).grad.clone() for name in parameters}  # type: ignore[union-attr]

    whole = gradients(x)
    assert max(relative_errors(grad(loss)(parameters, x), whole).values()) < 1e-4
    each = vmap(grad(loss), (None, 0))(parameters, x[:, None])
    alone = [gradients(sample[None]) for sample in x]
    assert max(relative_errors(each, {n: torch.stack([one[n] for one in alone]) for n in whole}).values()) < 1e-4
    torch.testing.assert_close(vmap(model)(x[:, None])[:, 0], model(x), rtol=1e-4, atol=1e-5)
    towards = {name: torch.randn_like(one) for name, one in parameters.items()}
    _, along = jvp(lambda given: loss(given, x), (parameters,), (towards,))
    assert along.item() == pytest.approx(sum(float((whole[n] * towards[n]).sum()) for n in whole), rel=1e-3, abs=1e-5)
    for parameter in parameters.values():
        assert parameter.requires_grad is False
    assert max(relative_errors(gradients(x), whole).values()) < 1e-6  # and nothing is left behind
