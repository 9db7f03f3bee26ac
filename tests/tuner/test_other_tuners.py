"""A LoRA of PEFT on the same layers, inside or around: merged and unloaded right, or refused before any change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from helpers import (
    EVERY_METHOD,
    FEW,
    HOSTS_OF_12,
    LORA,
    UPDATES,
    OneLayer,
    assert_unchanged,
    configured,
    error_of_update,
    move,
    only,
    relative_error,
    seeded_host,
    snapshot,
)
from isotune import get_peft_model

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.parametrize("host", ["linear", "transposed", "conv1d", "embedding"]),
    pytest.mark.covered(method=FEW, host=("linear", "conv1d", "embedding")),
]


def lora(host: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["layer"], fan_in_fan_out=host == "transposed")


def injected(method: str, host: str, base: nn.Module, name: str) -> nn.Module:
    config = lora(host) if method == LORA else configured(method, ["layer"])
    return move(inject_adapter_in_model(config, base, name), only=name)


def both(method: str, host: str, inner: str) -> nn.Module:
    """A host with both tuners, the inner one injected first."""
    if inner == "isotune" and host.startswith("conv"):
        pytest.skip("PEFT's LoRA asks a convolution below it for its groups, which no tuner's layer has")
    model: nn.Module = seeded_host(host)
    for one, name in ((LORA, "style"), (method, "mine"))[:: 1 if inner == "lora" else -1]:
        model = injected(one, host, model, name)
    return model.eval()


def tuned(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer) and hasattr(module, "merge")]


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


def assert_right_or_refused(model: nn.Module, x: Tensor, base: Tensor, change: Callable[[], Any]) -> bool:
    """Run what must not change the output; whether it was done."""
    before, expected = snapshot(model), outputs(model, x)
    try:
        found = change()
    except ValueError:
        assert_unchanged(model, before)
        assert torch.equal(outputs(model, x), expected)
        return False
    assert error_of_update(outputs(found or model, x), expected, base) < 1e-4
    return True


@pytest.mark.parametrize("inner", ["lora", "isotune"])
@pytest.mark.parametrize("order", [1, -1])
def test_fused_as_diffusers_does(method: str, host: str, inner: str, order: int) -> None:
    """Every tuner layer is merged, then every one unmerged, in the order of the model or against it."""
    model, x = both(method, host, inner), HOSTS_OF_12[host][1]()
    base, expected = outputs(seeded_host(host), x), outputs(model, x)
    beside = inner == "isotune" or (method not in UPDATES and host in ("conv1d", "embedding"))
    for layer in tuned(model)[::order]:
        try:
            layer.merge()
        except ValueError:  # ours; a LoRA merges without asking
            assert not layer.merged
        merged = [name for one in tuned(model) if one.merged for name in one.merged_adapters]
        if beside and "style" in merged and "mine" not in merged:
            for part in (model, *(one for one in tuned(model) if hasattr(one, "isotune_operator"))):
                with pytest.raises(ValueError, match="would not act on it as it does unmerged"):
                    outputs(part, x)
            continue
        assert error_of_update(outputs(model, x), expected, base) < 1e-4
    for layer in tuned(model)[::order]:
        if layer.merged:
            layer.unmerge()
    assert error_of_update(outputs(model, x), expected, base) < 1e-4
    weight = next(m for m in model.modules() if not isinstance(m, BaseTunerLayer) and hasattr(m, "weight")).weight
    assert relative_error(weight.detach(), seeded_host(host).layer.weight.detach()) < 1e-5


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_peft_model_around_a_lora(method: str, host: str, how: str, safe: bool) -> None:
    lone = injected(LORA, host, seeded_host(host), "style").eval()
    x = HOSTS_OF_12[host][1]()
    base = outputs(seeded_host(host), x)
    model = move(get_peft_model(lone, configured(method, ["layer"]), adapter_name="mine"), only="mine").eval()
    action = getattr(model, how)
    done = assert_right_or_refused(model, x, base, lambda: action(safe_merge=safe))
    if done and how == "merge_adapter":
        assert_right_or_refused(model, x, base, model.unmerge_adapter)


def test_unloading_around_a_lora(method: str, host: str) -> None:
    """The LoRA is the base that the adapter was put on, and must still be there; or nothing is unloaded."""
    lone, x = injected(LORA, host, seeded_host(host), "style").eval(), HOSTS_OF_12[host][1]()
    base, expected = outputs(seeded_host(host), x), outputs(lone, x)
    model = move(get_peft_model(lone, configured(method, ["layer"]), adapter_name="mine"), only="mine").eval()
    before = snapshot(model)
    try:
        plain = model.unload()
    except ValueError:
        assert_unchanged(model, before)
        return
    assert error_of_update(outputs(plain, x), expected, base) < 1e-5


@pytest.mark.parametrize("inner", ["lora", "isotune"])
def test_both_are_trained(method: str, host: str, inner: str) -> None:
    model, x = both(method, host, inner), HOSTS_OF_12[host][1]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mine" in name or "style" in name)
    model(x).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(g is not None and bool(g.any()) for g in grads.values()), [n for n, g in grads.items() if g is None]


def test_merging_one_alone_then_adapting_the_result(method: str, host: str) -> None:
    """What the refusal tells to do."""
    lone, x = injected(LORA, host, seeded_host(host), "style").eval(), HOSTS_OF_12[host][1]()
    expected = outputs(lone, x)
    for layer in tuned(lone):
        layer.merge()
    plain = OneLayer(tuned(lone)[0].get_base_layer())
    assert relative_error(outputs(plain, x), expected) < 1e-5
    model = move(get_peft_model(plain, configured(method, ["layer"]))).eval()
    adapted = outputs(model, x)
    assert relative_error(adapted, expected) > 1e-3
    assert not only(model).merged
    assert relative_error(outputs(model.merge_and_unload(), x), adapted) < 1e-5
