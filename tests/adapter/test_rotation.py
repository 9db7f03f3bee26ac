"""Rotations of outputs, beside what the contract says of them: what is stored, refused, and not mixed with inputs'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import (
    FORMS,
    OPTIONS_FOR_TINY,
    OneLayer,
    Stack,
    form_of,
    layers_of,
    merged_matrix,
    only,
    randomize,
    relative_error,
    some_tokens,
    tiny_llama,
)
from isotune import HRAConfig, OFTConfig, get_peft_model, hotswap_adapter
from isotune.diagnostics.inspect import inspect
from isotune.methods import METHODS

OF_OUTPUTS = [form for form in FORMS if form not in METHODS]


def config(form: str, *targets: str, **options: Any) -> Any:
    name, side = form_of(form)
    return METHODS[name](target_modules=list(targets), **{**OPTIONS_FOR_TINY[name], **side, **options})


@pytest.mark.parametrize("form", OF_OUTPUTS)
def test_a_file_says_its_side_and_means_the_same_when_loaded(form: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(form, "q_proj", "down_proj")).eval()
    randomize(model)
    model.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    own = METHODS[form_of(form)[0]].side  # what a file of this method means that does not say it
    assert (stored.get("side"), stored["isotune_format"]) == (("output", 2) if own == "input" else (None, 1))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    tokens = some_tokens()
    assert relative_error(loaded(tokens).logits.detach(), model(tokens).logits.detach()) < 1e-6
    swapped = get_peft_model(tiny_llama(), config(form, "q_proj", "down_proj")).eval()
    hotswap_adapter(swapped, tmp_path)
    assert relative_error(swapped(tokens).logits.detach(), model(tokens).logits.detach()) < 1e-6
    rows = {row.module: row for row in inspect(tmp_path, tiny_llama()).layers}
    assert len(rows) == len(layers_of(model))
    for layer in layers_of(model):
        row = rows[layer.key]
        assert row.rank == layer.out_features
        change = float(torch.linalg.vector_norm(layer.get_delta_weight("default")))
        assert row.update_norm == pytest.approx(change, rel=1e-4)


def test_a_file_of_a_rotation_of_inputs_stays_of_version_1(tmp_path: Path) -> None:
    OFTConfig(oft_block_size=8).save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "side" not in stored
    assert stored["isotune_format"] == 1


def test_a_side_that_is_set_later_is_of_version_2_too(tmp_path: Path) -> None:
    later = OFTConfig(oft_block_size=8)
    later.side = "output"
    later.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["side"], stored["isotune_format"]) == ("output", 2)


@pytest.mark.parametrize("form", OF_OUTPUTS)
def test_an_embedding_has_no_outputs_to_rotate(form: str) -> None:
    with pytest.raises(ValueError, match="side='output' has no meaning on 'layer', a Embedding"):
        get_peft_model(OneLayer(nn.Embedding(16, 8)), config(form, "layer"))


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match="side='left'"):
        OFTConfig(side="left")  # type: ignore[arg-type]


def test_what_does_not_fit_the_outputs_says_so() -> None:
    with pytest.raises(ValueError, match="oft_block_size=8 does not divide the 12 outputs of 'layer'"):
        get_peft_model(OneLayer(nn.Linear(8, 12)), config("oft-output", "layer"))


def test_lengths_and_angles_of_columns_stay() -> None:
    """A rotation of inputs keeps those of the rows of W, one of outputs those of its columns."""
    options = {"oft_block_size": 4, "target_modules": "layer"}
    model = get_peft_model(OneLayer(nn.Linear(12, 16)), OFTConfig(side="output", **options))
    randomize(model)
    layer = only(model)
    turned = merged_matrix(layer).detach()
    weight = layer.host.matrix()
    torch.testing.assert_close(turned.T @ turned, weight.T @ weight, rtol=1e-4, atol=1e-5)
    assert relative_error(turned @ turned.T, weight @ weight.T) > 1e-2


def test_adapters_of_two_sides_are_not_mixed(tmp_path: Path) -> None:
    square = {"oft_block_size": 8, "target_modules": ["second"], "init_weights": False}

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(16, 16)

    model = get_peft_model(Square(), OFTConfig(**square), "a")
    model.add_adapter("b", OFTConfig(side="output", **square))
    with pytest.raises(ValueError, match=r"different sides \(input and output\)"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="side='output' instead of 'input'"):
        hotswap_adapter(model, tmp_path / "b", "a")


def test_the_mean_of_two_rotations_of_outputs() -> None:
    model = get_peft_model(Stack(), config("oft-output", "first", "third"), "a")
    model.add_adapter("b", config("oft-output", "first", "third"))
    randomize(model, "a", seed=1)
    randomize(model, "b", seed=2)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    for layer in layers_of(model):
        mean = layer.adapter("mean")
        assert mean.side == "output"
        eye = torch.eye(mean.size)
        torch.testing.assert_close(mean.matrix() @ mean.matrix().T, eye, rtol=1e-5, atol=1e-5)
        assert relative_error(mean.matrix(), layer.adapter("a").matrix()) > 1e-3


def test_reflections_of_outputs_are_an_update_of_low_rank() -> None:
    model = get_peft_model(OneLayer(nn.Linear(12, 16)), HRAConfig(r=4, side="output", target_modules="layer"))
    randomize(model)
    layer = only(model)
    up, down = layer.low_rank("default")
    assert (up.shape, down.shape) == ((16, 4), (4, 12))
    assert relative_error(up @ down, layer.get_delta_weight("default")) < 1e-5


@pytest.mark.parametrize("form", OF_OUTPUTS)
def test_a_host_whose_output_is_float32_under_autocast(form: str) -> None:
    """As four-bit layers of bitsandbytes give it for an input in float32."""

    class Wide(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float()

    model = get_peft_model(OneLayer(Wide(8, 16)), config(form, "layer"))
    randomize(model)
    x = torch.randn(5, 8, requires_grad=True)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
    assert result.dtype == torch.float32
    assert relative_error(result.detach(), expected) < 2e-2
    result.sum().backward()
    assert all(p.grad is not None for p in only(model).isotune_operator.parameters())
