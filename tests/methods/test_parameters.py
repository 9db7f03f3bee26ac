"""The number of trained parameters of every method, on models of real shapes without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_psoft import ENCODER, deberta_v3_base, llama_3b
from torch import nn

from helpers import layers_of, trainable
from isotune import get_peft_model
from isotune.methods import METHODS
from isotune.tuner.layer import Layer

FORMULAS: dict[str, tuple[dict[str, Any], Callable[[int, int], int]]] = {
    "psoft": ({"r": 46}, lambda d, n: 46 * 45 // 2 + 2 * 46),
    "oft": ({"oft_block_size": 32}, lambda d, n: d * 31 // 2),
    "boft": ({"boft_block_size": 8, "boft_n_butterfly_factor": 2}, lambda d, n: 2 * d * 7 // 2 + n),
    "goft": ({}, lambda d, n: d - 1),
    "qgoft": ({}, lambda d, n: 4 * (d - 1)),
    "hra": ({"r": 8}, lambda d, n: 8 * d),
    "road": ({}, lambda d, n: n),
    "lora_xs": ({"r": 46}, lambda d, n: 46 * 46),
    "svfit": ({"r": 46}, lambda d, n: 46),
    "oplora": ({"r": 8}, lambda d, n: 8 * (d + n)),
    "rosa": ({"r": 8}, lambda d, n: 8 * (d + n)),
    "peso": ({"r": 8}, lambda d, n: 8 * (d + n)),
    "cersa": ({"r": 46}, lambda d, n: 46 * 46),
    "uora": ({"r": 256}, lambda d, n: 256 + n),
}
"""Method -> options, and what a layer with d inputs and n outputs trains."""

VARIANTS: list[tuple[str, dict[str, Any], Callable[[int, int], int]]] = [
    *((method, options, formula) for method, (options, formula) in FORMULAS.items()),
    ("oft", {"r": 32}, lambda d, n: 32 * (d // 32) * (d // 32 - 1) // 2),
    ("oft", {"r": 32, "block_share": True}, lambda d, n: (d // 32) * (d // 32 - 1) // 2),
    ("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, lambda d, n: d + n),
    ("road", {"variant": "road_2", "group_size": 32}, lambda d, n: 2 * n),
    ("road", {"variant": "road_4", "side": "input"}, lambda d, n: 4 * d),
    ("boft", {"boft_block_num": 16}, lambda d, n: d * (d // 16 - 1) // 2 + n),
]

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "deberta": (deberta_v3_base, ENCODER, 72),
    "llama": (llama_3b, "all-linear", 196),
}
_BUILT: dict[str, nn.Module] = {}


def adapted(model: str, method: str, targets: Any = None, **options: Any) -> Any:
    """The model with this adapter. It is built once, since an adapter on it is taken off again by `unload`."""
    build, own, _ = MODELS[model]
    if model not in _BUILT:
        with torch.device("meta"):
            _BUILT[model] = build()
    return get_peft_model(_BUILT[model], METHODS[method](target_modules=targets or own, **options))


def trained(layers: list[Layer]) -> int:
    return sum(p.numel() for layer in layers for p in layer.adapter("default").parameters() if p.requires_grad)


def test_every_method_has_a_formula() -> None:
    assert set(FORMULAS) == set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize(("method", "options", "formula"), VARIANTS, ids=lambda v: str(v) if not callable(v) else "")
def test_trained_parameters_are_those_of_the_formula(
    model: str, method: str, options: dict[str, Any], formula: Callable[[int, int], int]
) -> None:
    peft_model = adapted(model, method, **options)
    layers = layers_of(peft_model)
    assert len(layers) == MODELS[model][2]
    for layer in layers:
        assert trained([layer]) == formula(layer.in_features, layer.out_features), layer.key
    # And nothing else of the model is trained by the adapter.
    ours = {name: p for name, p in trainable(peft_model).items() if "isotune_operator" in name}
    assert sum(p.numel() for p in ours.values()) == trained(layers)
    others = [name for name in trainable(peft_model) if name not in ours]
    assert others == []
    peft_model.unload()


# Wu et al., PSOFT (ICLR 2026), the #Params columns (in millions) for DeBERTaV3-base and Llama-3.2-3B, all layers.
PUBLISHED = [
    ("deberta", "goft", {}, 0.08),
    ("deberta", "qgoft", {}, 0.33),
    ("deberta", "oft", {"oft_block_size": 32}, 1.29),
    ("deberta", "psoft", {"r": 46}, 0.08),
    ("llama", "goft", {}, 0.75),
    ("llama", "qgoft", {}, 2.98),
    ("llama", "oft", {"oft_block_size": 32}, 11.6),
    # Yuan et al., HRA (NeurIPS 2024), GLUE.
    ("deberta", "hra", {"r": 8}, 0.66),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "options", "millions"), PUBLISHED)
def test_published_numbers_of_parameters(model: str, method: str, options: dict[str, Any], millions: float) -> None:
    peft_model = adapted(model, method, **options)
    digits = len(str(millions).split(".")[1])
    # PSOFT's table cuts some figures off instead of rounding them (0.0811 and 0.0829 are both 0.08).
    assert round(trained(layers_of(peft_model)) / 1e6, digits) == millions
    peft_model.unload()


@pytest.mark.parametrize(
    ("model", "block", "millions"), [("deberta", 8, 1.41), ("llama", 2, 3.76)], ids=["deberta", "llama"]
)
def test_published_numbers_of_boft_count_whole_blocks(model: str, block: int, millions: float) -> None:
    """PEFT stores b² numbers a block, of which b(b − 1)/2 matter; the paper's table counts the former."""
    peft_model = adapted(model, "boft", boft_block_size=block, boft_n_butterfly_factor=2)
    layers = layers_of(peft_model)
    whole = sum(
        layer.adapter("default").generator.shape[:2].numel() * block**2 + layer.adapter("default").gain.numel()
        for layer in layers
    )
    assert round(whole / 1e6, 2) == millions
    below = sum(2 * layer.in_features // block * block * (block + 1) // 2 for layer in layers)
    assert trained(layers) == whole - below
    peft_model.unload()


@pytest.mark.parametrize(("block", "factors", "millions"), [(8, 2, 0.75), pytest.param(16, 1, 0.79, id="OFT b=16")])
def test_published_numbers_of_the_boft_paper(block: int, factors: int, millions: float) -> None:
    """Liu et al., BOFT (ICLR 2024), GLUE: b(b − 1)/2 a block, the gain, and the bias of every layer."""
    options = {"boft_block_size": block, "boft_n_butterfly_factor": factors}
    peft_model = adapted("deberta", "boft", **options, bias="isotune_only")
    layers = {f"base_model.model.{layer.key}" for layer in layers_of(peft_model)}
    count = trained(layers_of(peft_model))
    for name, parameter in trainable(peft_model).items():
        if name.endswith(".base_layer.bias") and name.removesuffix(".base_layer.bias") in layers:
            count += parameter.numel()
    assert round(count / 1e6, 2) == millions
    peft_model.unload().requires_grad_(False)


def test_published_numbers_of_peft_s_benchmark() -> None:
    """MetaMathQA on Llama-3.2-3B, q_proj and v_proj: 32 blocks of OFT; BOFT with whole 4 × 4 blocks."""
    peft_model = adapted("llama", "oft", ["q_proj", "v_proj"], r=32)
    assert trained(layers_of(peft_model)) == 8_171_520
    peft_model.unload()
    peft_model = adapted("llama", "boft", ["q_proj", "v_proj"], boft_block_size=4)
    layers = layers_of(peft_model)
    below = sum(layer.in_features // 4 * 10 for layer in layers)  # the diagonal and the lower triangle of each block
    assert trained(layers) + below == 802_816
    peft_model.unload()
