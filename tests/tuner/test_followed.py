"""Passes that torch follows leave nothing behind, and what was evaluated before does not stand in for what they do."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
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
