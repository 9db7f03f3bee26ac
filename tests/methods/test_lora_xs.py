"""LoRA-XS against its paper: the split of the singular values, training, the start and the parameter counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import (
    Stack,
    adapt,
    assert_all_differ,
    down_of,
    layers_of,
    only,
    randomize,
    relative_error,
    tiny_llama,
    trainable,
    up_of,
)
from isotune import LoraXsConfig, get_peft_model
from isotune.methods.lora_xs import LoraXsOperator


class Paper(nn.Module):
    """y = W x + s·B R A x with A = S_r V_rᵀ and B = U_r from torch's own singular value decomposition."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self.weight, self.scale = weight, alpha / rank
        self.a, self.b = values[:rank, None] * right[:rank], left[:, :rank]
        self.r = nn.Parameter(torch.zeros(rank, rank, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.scale * (x @ self.a.T @ self.r.T @ self.b.T)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_training_is_the_paper_s(shape: tuple[int, int], alpha: float | None) -> None:
    """The same R after ten steps of Adam, up to the signs of the singular vectors, which Adam does not see."""
    layer = nn.Linear(*shape, bias=False, dtype=torch.float64)
    twin = Paper(layer.weight.detach().clone(), 5, alpha or 5)
    model = get_peft_model(nn.Sequential(layer), LoraXsConfig(r=5, lora_alpha=alpha, target_modules=["0"]))
    layer, operator = only(model), only(model).adapter("default")
    signs = torch.sign((down_of(layer) * twin.a).sum(1))
    torch.testing.assert_close(down_of(layer), twin.a * signs[:, None])
    torch.testing.assert_close(up_of(layer), twin.scale * twin.b * signs)
    with torch.no_grad():
        twin.r.copy_(operator.coefficients * signs[:, None] * signs)
    x, target = torch.randn(30, shape[0], dtype=torch.float64), torch.randn(30, shape[1], dtype=torch.float64)
    outputs = []
    for trained in (model, twin):
        optimizer = torch.optim.Adam(trainable(trained).values(), lr=4e-3)
        for _ in range(10):
            (trained(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(trained(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(operator.coefficients, twin.r * signs[:, None] * signs)
    assert float(operator.coefficients.abs().max()) > 1e-2


def test_the_start_is_a_normal_sample_of_the_given_size() -> None:
    for std in (1e-5, 1e-3):
        operator = LoraXsOperator(64, std)
        found = operator.coefficients.detach() / std
        assert float(found.std()) == pytest.approx(1, abs=0.05)
        assert float(found.mean()) == pytest.approx(0, abs=0.05)
        assert not operator.is_identity()
        assert operator.is_untrained()
        operator.randomize_parameters()
        assert not operator.is_untrained()
    assert LoraXsOperator(4, 0.0).is_identity()


def test_the_start_is_the_base_up_to_the_size_of_r_and_exactly_so_with_zero() -> None:
    x = torch.randn(16, 24)
    for std in (1e-5, 1e-4, 0.0):
        base = Stack()
        expected = base(x).detach()
        model = adapt(base, LoraXsConfig(r=8, init_std=std, target_modules=["first", "second", "third"]))
        error = relative_error(model(x), expected)
        assert error == 0 if std == 0 else 0.1 * std < error < 30 * std


def test_an_untrained_adapter_follows_a_base_that_is_loaded_after_it() -> None:
    """Although R is not zero: only a trained one is bound to the base it was trained on."""
    model = adapt(Stack(), LoraXsConfig(r=8, target_modules=["second"]))
    torch.manual_seed(5)
    other = Stack()
    weights = {f"base_model.model.{name}": value for name, value in other.state_dict().items()}
    weights = {name.replace("second.", "second.base_layer."): value for name, value in weights.items()}
    model.load_state_dict(weights, strict=False)
    expected = adapt(other, LoraXsConfig(r=8, target_modules=["second"]))
    assert relative_error(down_of(only(model), "default"), down_of(only(expected), "default")) < 1e-6


KNOBS: list[dict[str, Any]] = [
    {"r": 7},
    {"lora_alpha": 4.0},
    {"rank_pattern": {"second": 4}},
    {"alpha_pattern": {"second": 2.0}},
    {"init_weights": True, "init_std": 0.2},
    {"init_weights": True},
]


def test_every_knob_changes_the_output() -> None:
    x, outputs = torch.randn(4, 24), {}
    for knob in [{}, *KNOBS]:
        torch.manual_seed(0)
        base = Stack()
        torch.manual_seed(1)
        options = {"r": 8, "init_weights": False, "target_modules": ["second"], **knob}
        outputs[str(knob)] = adapt(base, LoraXsConfig(**options))(x).detach()
    assert_all_differ(outputs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_std": -1e-5}, "init_std=-1e-05"),
        ({"init_std": float("nan")}, "init_std"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "alpha_pattern"),
        ({"r": 0}, "r=0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoraXsConfig(**options)


@pytest.mark.parametrize("basis", ["pinned", "embedded"])
def test_a_saved_adapter_is_the_same_function(basis: Any, tmp_path: Any) -> None:
    tokens = torch.arange(4, 18).reshape(2, 7)
    model = adapt(tiny_llama(), LoraXsConfig(r=6, lora_alpha=12, basis=basis, target_modules="all-linear"))
    randomize(model)
    expected = model(input_ids=tokens).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def mistral_7b() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig())


def gemma_7b() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layers", "millions"), [(mistral_7b, 224, 0.92), (gemma_7b, 196, 0.80)], ids=["Mistral-7B", "Gemma-7B"]
)
def test_parameter_counts_of_the_paper(build: Any, layers: int, millions: float) -> None:
    """All linear layers at r = 64, on models of the real shapes without weights."""
    with torch.device("meta"):
        model = build()
    model = get_peft_model(model, LoraXsConfig(r=64, target_modules="all-linear"))
    assert len(layers_of(model)) == layers
    count = sum(p.numel() for p in trainable(model).values())
    assert count == layers * 64**2
    assert round(count / 1e6, 2) == millions
