"""What was trainable before a model had adapters is so again where they are refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from helpers import Chain
from isotune import PsoftConfig, get_peft_model
from isotune.tuner.adapted_model import AdaptedModel, remove_adapter
from isotune.tuner.flags import Flags


def _exchanged(model: Any) -> None:
    """As torch moves a model whose parameters it cannot change in place."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("change", [lambda model: None, _exchanged, lambda model: model.to_empty(device="cpu")])
def test_flags_come_back_with_the_base(change: Callable[[Any], Any]) -> None:
    base = Chain()
    base.layers[0].bias.requires_grad_(False)
    base.layers[2].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    model = get_peft_model(base, PsoftConfig(r=4, target_modules=["layers.0", "layers.1"]))
    change(model)
    remove_adapter(base, "default")
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before


def test_nothing_is_kept_alive_and_nothing_is_weakly_referenced() -> None:
    model = get_peft_model(Chain(), PsoftConfig(r=4, target_modules=["layers.0"]))
    own = AdaptedModel.of(model.get_base_model())
    assert own is not None
    known = len(own.flags)
    del model.get_base_model().layers[2]
    assert len(own.flags) == known - 1
    assert not any(weakref.getweakrefcount(parameter) for parameter in model.parameters())


def test_another_parameter_of_the_name_has_the_flag() -> None:
    layer = nn.Linear(2, 2)
    flags = Flags.of(layer)
    layer.bias, layer.more = None, nn.Parameter(torch.zeros(2), requires_grad=False)
    layer.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    flags.restore()
    assert layer.weight.requires_grad
    assert not layer.more.requires_grad
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    flags.restore()
    assert not layer.weight.requires_grad
