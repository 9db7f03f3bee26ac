"""Scales as PEFT and diffusers set them: nothing drifts, 0 is the base, and a rotation has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers import EVERY_METHOD, FEW, HOSTS_OF_12, SUBSPACES, OneLayer, as_trained, only, relative_error, seeded_host

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(method=FEW, host=("linear", "conv2d", "embedding")),
]


@pytest.mark.parametrize("host", HOSTS_OF_12)
def test_the_scale_zero_is_the_base_and_one_brings_the_adapter_back(method: str, host: str) -> None:
    model, x = as_trained(method, seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    layer, expected, base = only(model), model(x).detach(), seeded_host(host)(x).detach()
    if method not in SUBSPACES:
        with pytest.raises(ValueError, match="scale can only be 1"):
            layer.scale_layer(0.0)
        with pytest.raises(ValueError, match="scale can only be 1"):
            layer.set_scale("default", 2.0)
        layer.scale_layer(1.0)
        layer.unscale_layer()
        assert torch.equal(model(x), expected)
        return
    weight = layer.host.weight.detach().clone()
    for _ in range(2):
        layer.scale_layer(0.0)
        assert relative_error(model(x).detach(), base) < 1e-6
        assert not layer.get_delta_weight("default").any()
        model.merge_adapter()
        assert torch.equal(layer.host.weight, weight)
        model.unmerge_adapter()
        model(x).sum().backward()
        layer.set_scale("default", 1.0)
        assert torch.equal(model(x), expected)
    layer.scale_layer(0.0)
    layer.unscale_layer(0.0)
    assert torch.equal(model(x), expected)
    layer.scale_layer(0.0)
    layer.unscale_layer()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_scales_leave_no_drift(method: str, dtype: torch.dtype) -> None:
    if method not in SUBSPACES:
        pytest.skip("a rotation has no scale")
    model = as_trained(method, OneLayer(nn.Linear(12, 20)).to(dtype), "layer")
    layer, x = only(model), torch.randn(8, 12).to(dtype)
    expected = model(x).detach()
    for scale in torch.rand(300).add(0.3).tolist():
        layer.scale_layer(scale)
        layer.unscale_layer(scale)
    # A scale is a number of Python's: 300 products leave some of its last bits.
    assert layer.adapter("default").relative_scale == pytest.approx(1.0, rel=1e-12)
    assert relative_error(model(x).detach(), expected) <= (1e-6 if dtype == torch.float32 else 0.0)
    layer.unscale_layer()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("scale", [0.5, 2.0, -1.0])
def test_a_scale_acts_alike_in_every_way_of_running(method: str, scale: float) -> None:
    if method not in SUBSPACES:
        pytest.skip("a rotation has no scale")
    model = as_trained(method, seeded_host("linear"), "layer")
    layer, x = only(model), torch.randn(8, 12)
    base, full = seeded_host("linear")(x).detach(), model(x).detach()
    layer.set_scale("default", scale)
    expected = base + scale * (full - base)
    found: dict[str, Any] = {"training": model.train()(x), "input with a gradient": model(x.clone().requires_grad_())}
    with torch.no_grad():
        found["no gradients"] = model.eval()(x)
    up, down = layer.low_rank("default")
    found["low rank"] = base + x @ (up @ down).T
    found["the weight"] = nn.functional.linear(x, layer.weight, layer.get_base_layer().bias)
    model.merge_adapter()
    found["merged"] = model(x)
    for name, output in found.items():
        assert relative_error(output.detach(), expected) < 1e-5, name
