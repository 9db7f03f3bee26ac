"""Magnitudes and gains lie near 1, where half precision has no room for an optimiser's steps; that is said once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from helpers import layers_of, some_tokens, tiny_llama
from isotune import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.errors import IsotuneWarning

NEAR_ONE = {
    "psoft": (PsoftConfig(r=4, target_modules=["q_proj", "v_proj"]), "input_scale and output_scale"),
    "psoft, β": (PsoftConfig(r=4, psoft_mag_a=False, target_modules=["q_proj"]), "output_scale"),
    "boft": (BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj"]), "output_gain"),
}
OTHERS = {
    "psoft-so": PsoftConfig(r=4, psoft_mag_a=False, psoft_mag_b=False, target_modules=["q_proj"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "hra": HRAConfig(r=4, target_modules=["q_proj"]),
}


def warnings_of(model: nn.Module, passes: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(passes):
            model.train()(input_ids=some_tokens())
    return [str(one.message) for one in seen if issubclass(one.category, IsotuneWarning)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", NEAR_ONE)
def test_it_is_said_once(method: str, dtype: torch.dtype) -> None:
    config, names = NEAR_ONE[method]
    model = get_peft_model(tiny_llama(), config)
    assert warnings_of(model) == []  # float32
    model.to(dtype)
    with torch.no_grad():
        assert warnings_of(model) == []
    model.eval()(input_ids=some_tokens())  # nothing is trained, and a warning is an error here
    (said,) = warnings_of(model)
    assert said.startswith(f"{names} of an adapter ")
    assert f" trained in {str(dtype).removeprefix('torch.')}, " in said
    assert "p.data = p.data.float()" in said


def test_what_is_said_is_true_and_helps() -> None:
    for helped in (False, True):
        model = get_peft_model(tiny_llama(), PsoftConfig(r=4, target_modules=["q_proj"])).bfloat16()
        if helped:
            for p in model.parameters():
                if p.requires_grad:
                    p.data = p.data.float()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-4, weight_decay=0)
        assert len(warnings_of(model, 1)) == (not helped)
        tokens = some_tokens()
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = [bool((layer.adapter("default").input_scale != 1).any()) for layer in layers_of(model)]
        assert moved == [helped] * len(moved)


@pytest.mark.parametrize("method", OTHERS)
def test_others_and_frozen_ones_are_passed_over(method: str) -> None:
    assert warnings_of(get_peft_model(tiny_llama(), OTHERS[method]).bfloat16()) == []
    frozen: Any = get_peft_model(tiny_llama(), NEAR_ONE["psoft"][0]).bfloat16()
    frozen.requires_grad_(False)
    assert warnings_of(frozen) == []


def test_a_half_base_leaves_the_parameters_in_float32() -> None:
    model = get_peft_model(tiny_llama().bfloat16(), NEAR_ONE["boft"][0])
    assert warnings_of(model) == []
    unwanted = get_peft_model(tiny_llama().bfloat16(), NEAR_ONE["boft"][0], autocast_adapter_dtype=False)
    assert len(warnings_of(unwanted)) == 1


def test_a_frozen_first_layer_hides_nothing() -> None:
    model = get_peft_model(tiny_llama(), PsoftConfig(r=4, target_modules=["q_proj", "v_proj"])).to(torch.bfloat16)
    for parameter in layers_of(model)[0].isotune_operator.parameters():
        parameter.requires_grad_(False)
    assert len(warnings_of(model)) == 1
