"""Scales as PEFT and diffusers set them: nothing drifts, 0 is the base, and a rotation is taken in part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import (
    EVERY_METHOD,
    FEW,
    HOSTS_OF_12,
    UPDATES,
    OneLayer,
    as_trained,
    assert_gradients_are_right,
    only,
    relative_error,
    seeded_host,
    trainable,
)
from isotune import HRAConfig, add_adapter, get_peft_model
from isotune.algebra.cayley import bound_entries
from isotune.tuner.layer import Layer

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(method=FEW, host=("linear", "conv2d", "embedding")),
]


@pytest.mark.parametrize("host", HOSTS_OF_12)
def test_the_scale_zero_is_the_base_and_one_brings_the_adapter_back(method: str, host: str) -> None:
    model, x = as_trained(method, seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    layer, expected, base = only(model), model(x).detach(), seeded_host(host)(x).detach()
    weight = layer.host.weight.detach().clone()
    for _ in range(2):
        layer.scale_layer(0.0)
        assert relative_error(model(x).detach(), base) < 1e-6
        assert not layer.get_delta_weight("default").any()
        assert layer.adapter("default").relative_scale == 0.0
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
    if method == "hra":
        pytest.skip("reflections have no parts")
    model = as_trained(method, OneLayer(nn.Linear(12, 20)).to(dtype), "layer")
    layer, x = only(model), torch.randn(8, 12).to(dtype)
    expected = model(x).detach()
    for scale in torch.rand(300).add(0.3).tolist():
        layer.scale_layer(scale)
        layer.unscale_layer(scale)
    # A scale is a number of Python's: 300 products leave some of its last bits.
    assert layer.adapter("default").relative_scale == pytest.approx(1.0, rel=1e-12)
    assert relative_error(model(x).detach(), expected) <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    layer.unscale_layer()
    assert torch.equal(model(x), expected)


def scaled_parameters(layer: Layer, scale: float) -> None:
    """Multiply what an adapter's parameters differ from the identity by; a bounded generator within its bound."""
    adapter = layer.adapter("default")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            bound = getattr(getattr(adapter, "cayley", None), "generator_bound", None)
            own = parameter if bound is None else bound_entries(parameter, bound)
            parameter.copy_(1 + scale * (own - 1) if name in ("output_gain", "scales") else scale * own)


@pytest.mark.parametrize("scale", [0.5, 2.0, -1.0])
def test_a_scale_acts_alike_in_every_way_of_running(method: str, scale: float) -> None:
    """An update so many times, and a rotation by so many times its generators, angles and gains."""
    model = as_trained(method, seeded_host("linear"), "layer")
    layer, x = only(model), torch.randn(8, 12)
    base, full = seeded_host("linear")(x).detach(), model(x).detach()
    if method == "hra":
        with pytest.raises(ValueError, match=r"'default' on 'layer': .* only 0 or 1, as reflections have no parts"):
            layer.set_scale("default", scale)
        assert torch.equal(model(x), full)
        return
    if method == "coft" and scale == 2.0:
        pytest.skip("a generator of twice its bound is bounded again")
    twin = copy.deepcopy(model)
    layer.set_scale("default", scale)
    if method in UPDATES:
        expected = base + scale * (full - base)
    else:
        scaled_parameters(only(twin), scale)
        expected = twin(x).detach()
        assert relative_error(expected, full) > 1e-2
    found: dict[str, Any] = {"training": model.train()(x), "input with a gradient": model(x.clone().requires_grad_())}
    with torch.no_grad():
        found["no gradients"] = model.eval()(x)
    if method in UPDATES:
        up, down = layer.low_rank("default")
        found["low rank"] = base + x @ (up @ down).T
    found["the weight"] = nn.functional.linear(x, layer.weight, layer.get_base_layer().bias)
    changed = layer.host.weight + layer.get_delta_weight("default")
    found["change of the weight"] = nn.functional.linear(x, changed, layer.get_base_layer().bias)
    model.merge_adapter()
    found["merged"] = model(x)
    for name, output in found.items():
        assert relative_error(output.detach(), expected) < 1e-5, name


@pytest.mark.parametrize("scale", [0.5, -1.0])
def test_gradients_at_a_scale(method: str, scale: float) -> None:
    if method == "hra":
        pytest.skip("reflections have no parts")
    model = as_trained(method, seeded_host("linear").double(), "layer").double()
    only(model).set_scale("default", scale)
    x, parameters = torch.randn(3, 12, dtype=torch.float64), trainable(model)

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    assert_gradients_are_right(function, *(p.detach().clone().requires_grad_() for p in parameters.values()))


def test_a_part_of_a_rotation_is_a_rotation(method: str) -> None:
    if method not in ("oft", "coft", "oft-output", "goft"):
        pytest.skip("an update, reflections, or a rotation that is no orthogonal matrix of one factor")
    model = as_trained(method, seeded_host("linear"), "layer")
    only(model).set_scale("default", 0.3)
    part = only(model).adapter("default").matrix().detach()
    torch.testing.assert_close(part @ part.T, torch.eye(len(part)), rtol=1e-5, atol=1e-5)


def test_a_refused_scale_changes_no_adapter_of_the_layer(method: str) -> None:
    model = as_trained(method, seeded_host("linear"), "layer")
    add_adapter(model, "other", HRAConfig(r=4, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(8, 12)
    expected = model(x).detach()
    with pytest.raises(ValueError, match="reflections have no parts"):
        only(model).scale_layer(0.5)
    assert only(model).adapter("default").relative_scale == 1.0
    assert torch.equal(model(x), expected)


def test_orthonormal_reflections_at_scale_zero(method: str) -> None:
    """A direction of length zero would still be made orthonormal and reflect."""
    if method != "hra":
        pytest.skip("for the strict form of HRA")
    for side in ("input", "output"):
        config = HRAConfig(r=3, apply_GS=True, init_weights=False, side=side, target_modules=["layer"])  # type: ignore[arg-type]
        model, x = get_peft_model(OneLayer(nn.Linear(12, 20)), config), torch.randn(8, 12)
        layer, expected = only(model), model(x).detach()
        layer.scale_layer(0.0)
        result = model(x)
        assert relative_error(result.detach(), layer.base_layer(x).detach()) < 1e-6
        assert not layer.get_delta_weight("default").any()
        result.square().sum().backward()
        assert not any(bool(p.grad.any()) for p in layer.isotune_operator.parameters() if p.grad is not None)
        layer.unscale_layer()
        assert torch.equal(model(x), expected)


def test_the_mean_is_of_what_was_trained(method: str) -> None:
    if method in ("hra", "qgoft"):
        pytest.skip("has no mean")
    model = as_trained(method, seeded_host("linear"), "layer")
    only(model).set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"'default' has the scale 0\.5 in 'layer'"):
        model.add_weighted_adapter(["default"], [1.0], "mean")
    assert list(model.peft_config) == ["default"]


def test_a_part_is_computed_in_float32(method: str) -> None:
    """Parameters in half precision are multiplied and bounded in float32, as they are evaluated."""
    if method not in ("oft", "coft", "boft", "goft"):
        pytest.skip("for rotations")
    model = as_trained(method, seeded_host("linear"), "layer")
    layer = only(model)
    layer.adapter("default").to(torch.bfloat16)
    twin = copy.deepcopy(model)
    only(twin).adapter("default").float()
    for one in (layer, only(twin)):
        one.set_scale("default", 0.3)
    assert relative_error(layer.get_delta_weight("default"), only(twin).get_delta_weight("default")) < 1e-5
