"""An adapter may be called like anything in its model, and a copy of its parameters is the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from helpers import (
    EVERY_METHOD,
    FEW,
    SUBSPACES,
    Chain,
    as_trained,
    assert_unchanged,
    configured,
    move,
    relative_error,
    snapshot,
    with_basis,
)
from isotune import get_peft_model

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(method=FEW, name=("0", "layers", "model", "base_layer", "pin", "default.x")),
]

NAMES = ["second", "0", "1", "12", "layers", "model", "base_model", "base_layer", "isotune_operator", "pin", "weight"]
NAMES += ["lay", "default2", "DEFAULT", "a b", "ä", "isotune_form", "forms", "adapter_model"]


def two(method: str, first: str, second: str) -> Any:
    model = get_peft_model(Chain(), configured(method), adapter_name=first)
    move(model)
    model.add_adapter(second, configured(method))
    model.set_adapter(second)
    return move(model, seed=2).eval()


def outputs(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for name in list(model.peft_config):
        model.set_adapter(name)
        found[name] = model(x).detach()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("comes_first", [True, False])
def test_two_adapters_are_saved_and_loaded(method: str, name: str, comes_first: bool, tmp_path: Path) -> None:
    names = (name, "other") if comes_first else ("other", name)
    model, x = two(method, *names), torch.randn(4, 12)
    expected = outputs(model, x)
    assert relative_error(*expected.values()) > 1e-3
    model.save_pretrained(tmp_path)
    for order in (names, names[::-1]):
        loaded = PeftModel.from_pretrained(Chain(), tmp_path / order[0], adapter_name=order[0])
        loaded.load_adapter(tmp_path / order[1], adapter_name=order[1])
        for one, found in outputs(loaded.eval(), x).items():
            assert relative_error(found, expected[one]) < 1e-4, one


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_of_one_adapter_go_into_another(method: str, name: str) -> None:
    model, x = two(method, "other", name), torch.randn(4, 12)
    expected = outputs(model, x)
    state = get_peft_model_state_dict(model, adapter_name=name)
    again = two(method, "other", name)
    move(again, seed=5)
    set_peft_model_state_dict(again, state, adapter_name="other")
    again.set_adapter("other")
    assert relative_error(again(x).detach(), expected[name]) < 1e-4


@pytest.mark.parametrize("name", ["default.x", "a.b.c", "."])
def test_a_name_that_no_module_can_have_is_refused(method: str, name: str) -> None:
    model, x = as_trained(method), torch.randn(4, 12)
    expected, before = model(x).detach(), snapshot(model)
    with pytest.raises((ValueError, KeyError)):
        model.add_adapter(name, configured(method))
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected)
    assert set(model.peft_config) == {"default"}


# -- a reference by copied parameters, as TRL's trainers make it -----------------------------------------------------


def copy_parameters(model: Any, source: str, target: str) -> None:
    """By name, as TRL does."""
    for name, parameter in list(model.named_parameters()):
        if f".{source}" in name:
            model.get_parameter(name.replace(f".{source}", f".{target}")).data.copy_(parameter)


@pytest.mark.parametrize("basis", ["pinned", "embedded"])
@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_a_reference_by_copied_parameters(
    method: str, basis: str, signs: bool, base_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also where the file has the singular vectors of another solver, with other signs."""
    options = with_basis(method, basis)
    as_trained(method, **options).save_pretrained(tmp_path)
    if signs:
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith((".pin", ".basis")):
                tensor[::2] *= -1
        save_file(tensors, file, metadata={"format": "pt"})
    model, x = PeftModel.from_pretrained(Chain().to(base_dtype), tmp_path, is_trainable=True), torch.randn(4, 12)
    x = x.to(base_dtype)
    expected = model(x).detach()
    model.add_adapter("ref", model.peft_config["default"])
    copy_parameters(model, "default", "ref")
    model.set_adapter("ref")
    assert relative_error(model(x).detach(), expected) < 1e-4
    move(model, only=".ref")
    model.set_adapter("default")
    assert torch.equal(model(x), expected)  # the copy is a copy


@pytest.mark.parametrize("basis", ["pinned", "embedded"])
def test_references_of_several_adapters(method: str, basis: str, tmp_path: Path) -> None:
    """Each from its own, with configurations that are equal, or differ in what the basis depends on."""
    options = with_basis(method, basis)
    model, x = as_trained(method, **options), torch.randn(4, 12)
    other = {"r": 3} if "r" in options or method in (*SUBSPACES, "hra") else {}
    if method == "hra":
        other = {"r": 2}
    more = {"equal": {}, "other size": other, "other seed": {"basis_seed": 3} if method in SUBSPACES else {}}
    for name, changed in more.items():
        model.add_adapter(name, configured(method, **{**options, **changed}))
        model.set_adapter(name)
        move(model, seed=len(name))
    expected = outputs(model, x)
    for name in list(expected):
        model.add_adapter(f"{name} ref", model.peft_config[name])
        for layer in (module for module in model.modules() if hasattr(module, "isotune_operator")):
            layer.adapter(f"{name} ref").load_state_dict(layer.adapter(name).state_dict())
    found = outputs(model, x)
    for name, output in expected.items():
        assert relative_error(found[name], output) == 0, name
        assert relative_error(found[f"{name} ref"], output) < 1e-4, name
