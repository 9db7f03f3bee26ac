"""PSOFT against its paper: the operator, the geometry that the theorem promises, the scale and the parameter counts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import (
    adapt,
    assert_all_differ,
    down_of,
    layers_of,
    psoft,
    randomize,
    reference_difference,
    relative_error,
    trainable,
    up_of,
)
from isotune import PsoftConfig, get_peft_model
from isotune.errors import IsotuneWarning
from isotune.methods.psoft import PsoftOperator

# -- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("input_scale", [True, False])
@pytest.mark.parametrize("output_scale", [True, False])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_operator_is_the_definition(size: int, input_scale: bool, output_scale: bool, orthogonal: bool) -> None:
    operator = PsoftOperator(size, orthogonal=orthogonal, input_scale=input_scale, output_scale=output_scale).double()
    assert not operator.difference().any()  # the identity, exactly
    operator.randomize_parameters()
    expected = reference_difference(operator)
    torch.testing.assert_close(operator.difference(), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(operator.matrix(), expected + torch.eye(size))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_operator_gradients_are_those_of_the_definition(orthogonal: bool) -> None:
    operator = PsoftOperator(6, orthogonal=orthogonal).double()
    operator.randomize_parameters()
    weights = torch.randn(6, 6, dtype=torch.float64)
    ours = torch.autograd.grad((operator.difference() * weights).sum(), list(operator.parameters()))
    theirs = torch.autograd.grad((reference_difference(operator) * weights).sum(), list(operator.parameters()))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_small_magnitudes_keep_their_relative_precision(size: float) -> None:
    """αβ − 1 must not be formed from a product that has been rounded next to one."""
    operator = PsoftOperator(16)
    with torch.no_grad():
        operator.input_scale.add_(size * torch.randn(16))
        operator.output_scale.add_(size * torch.randn(16))
    expected = reference_difference(copy.deepcopy(operator).double())
    assert relative_error(operator.difference(), expected) < 1e-5


def test_the_rotation_trains_from_the_identity() -> None:
    """The gradient of every parameter at the start is that of the definition, and not zero."""
    operator = PsoftOperator(5).double()
    loss = (operator.difference() * torch.randn(5, 5, dtype=torch.float64)).sum()
    assert all(bool(g.any()) for g in torch.autograd.grad(loss, list(operator.parameters())))


KNOBS: list[dict[str, Any]] = [
    {"psoft_orth": False},
    {"psoft_mag_a": False},
    {"psoft_mag_b": False},
    {"use_cayley_neumann": True},
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 2},
    {"use_cayley_neumann": True, "cayley_neumann_eps": 0.1},
    {"ab_svd_init": "pissa_init"},
    {"r": 7},
    {"psoft_alpha": 4.0},
    {"rank_pattern": {"second": 4}},
    {"alpha_pattern": {"second": 2.0}},
]


@pytest.mark.filterwarnings("ignore::isotune.errors.IsotuneWarning")
def test_every_knob_changes_the_output() -> None:
    """No two of these configurations, with otherwise equal parameters, give the same function."""
    from helpers import Stack

    x, outputs = torch.randn(4, 24), {}
    for knob in [{}, *KNOBS]:
        torch.manual_seed(0)
        base = Stack()
        torch.manual_seed(1)
        outputs[str(knob)] = adapt(base, **{"target_modules": ["second"], **knob})(x).detach()
    assert_all_differ(outputs)


def test_psoft_init_has_orthonormal_rows_and_pissa_splits_the_singular_values() -> None:
    layer = nn.Sequential(nn.Linear(20, 12, bias=False))
    values = torch.linalg.svdvals(layer[0].weight)[:5]
    (strict,) = layers_of(adapt(layer, r=5, target_modules=["0"]))
    torch.testing.assert_close(down_of(strict) @ down_of(strict).T, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(up_of(strict).norm(dim=0), values)
    layer = nn.Sequential(nn.Linear(20, 12, bias=False))
    values = torch.linalg.svdvals(layer[0].weight)[:5]
    (split,) = layers_of(adapt(layer, r=5, target_modules=["0"], ab_svd_init="pissa_init"))
    torch.testing.assert_close(down_of(split).norm(dim=1), values.sqrt())
    torch.testing.assert_close(up_of(split).norm(dim=0), values.sqrt())


# -- the theorem ---------------------------------------------------------------------------------------------------


def principal_rows(layer: Any) -> tuple[Tensor, Tensor]:
    """The rows of W_pri = P V before and of P Mᵀ V after the adapter, in the layer's own dtype."""
    weight, basis = layer.host.matrix(), down_of(layer)
    operator = layer.adapter("default").matrix().detach()
    projection = weight @ basis.T
    return projection @ basis, projection @ operator.T @ basis


def assert_geometry(before: Tensor, after: Tensor, factor: float, tolerance: float) -> None:
    norms, norms_after = before.norm(dim=1), after.norm(dim=1)
    assert float((norms_after / norms - factor).abs().max()) <= tolerance * max(1.0, factor)
    cosines = (before @ before.T) / (norms[:, None] * norms)
    cosines_after = (after @ after.T) / (norms_after[:, None] * norms_after)
    assert float((cosines_after - cosines).abs().max()) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@given(
    rank=st.integers(1, 12),
    shape=st.sampled_from([(12, 12), (30, 12), (12, 30), (17, 13)]),
    magnitude=st.floats(1e-4, 30.0),
    seed=st.integers(0, 2**20),
)
def test_psoft_so_keeps_all_angles_and_norms(
    dtype: torch.dtype, tolerance: float, rank: int, shape: tuple[int, int], magnitude: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    config = PsoftConfig(r=rank, target_modules=["0"], psoft_mag_a=False, psoft_mag_b=False)
    layer = layers_of(get_peft_model(model, config))[0]
    with torch.no_grad():
        layer.adapter("default").generator.normal_().mul_(magnitude / rank)
    assert_geometry(*principal_rows(layer), 1.0, tolerance)
    # And what is really added to the weight is P Mᵀ V − P V.
    before, after = principal_rows(layer)
    delta = layer.get_delta_weight("default").to(dtype)
    assert float((delta - (after - before)).abs().max()) <= 10 * tolerance * float(before.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equal_magnitudes_keep_angles_and_scale_norms(dtype: torch.dtype, tolerance: float) -> None:
    model = nn.Sequential(nn.Linear(20, 33, dtype=dtype))
    layer = layers_of(adapt(model, r=9, target_modules=["0"]))[0]
    operator = layer.adapter("default")
    with torch.no_grad():
        operator.input_scale.fill_(1.7)
        operator.output_scale.fill_(0.6)
    assert_geometry(*principal_rows(layer), 1.7 * 0.6, tolerance)


def test_unequal_magnitudes_do_change_angles() -> None:
    """The test above can fail: its check notices what is not a rotation."""
    layer = layers_of(adapt(nn.Sequential(nn.Linear(20, 33)), r=9, target_modules=["0"]))[0]
    with pytest.raises(AssertionError):
        assert_geometry(*principal_rows(layer), 1.0, 1e-3)


# -- the scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 6])
def test_alpha_of_none_or_r_is_strict_and_silent(alpha: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = psoft(r=6, psoft_alpha=alpha, target_modules=["0"])
        assert config.scale_of("0") == 1.0
        model = adapt(nn.Sequential(nn.Linear(10, 10)), config)
        model(torch.randn(2, 10))


@pytest.mark.parametrize("alpha", [3.0, 12.0])
@pytest.mark.filterwarnings("ignore::isotune.errors.IsotuneWarning")
def test_alpha_scales_the_update_by_alpha_over_r(alpha: float) -> None:
    x, updates = torch.randn(4, 10), {}
    for value in (None, alpha):
        torch.manual_seed(3)
        base = nn.Sequential(nn.Linear(10, 14))
        expected = base(x).detach()
        model = adapt(base, r=6, psoft_alpha=value, target_modules=["0"])
        updates[value] = model(x).detach() - expected
    torch.testing.assert_close(updates[alpha], updates[None] * (alpha / 6), rtol=1e-4, atol=1e-5)


def test_one_warning_for_an_alpha_other_than_r() -> None:
    with warnings.catch_warnings(record=True) as given_warnings:
        warnings.simplefilter("always")
        model = adapt(nn.Sequential(nn.Linear(10, 10)), r=6, psoft_alpha=3.0, target_modules=["0"])
        model(torch.randn(2, 10))
        model.merge_and_unload()
    ours = [w for w in given_warnings if issubclass(w.category, IsotuneWarning)]
    assert len(ours) == 1
    assert "psoft_alpha" in str(ours[0].message)
    assert ours[0].filename == __file__ or "helpers" in ours[0].filename  # it points at the caller


def test_no_warning_for_an_alpha_without_orthogonality() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PsoftConfig(r=6, psoft_alpha=3.0, psoft_orth=False)
    assert config.scale_of("anything") == 0.5


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_trainable_parameters_a_layer(rank: int) -> None:
    model = adapt(nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 30)), r=rank, target_modules=["0", "1"])
    assert sum(p.numel() for p in trainable(model).values()) == 2 * (rank * (rank - 1) // 2 + 2 * rank)


def deberta_v3_base() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=128100,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            relative_attention=True,
            position_buckets=256,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type="p2c|c2p",
            type_vocab_size=0,
            max_relative_positions=-1,
            position_biased_input=False,
        )
    )


def vit_b16() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(), add_pooling_layer=False)


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
        )
    )


def llama_3b() -> nn.Module:
    return llama(3072, 8192, 28, 24)


def llama_8b() -> nn.Module:
    return llama(4096, 14336, 32, 32)


ENCODER = r".*encoder\.layer.*\.(query_proj|key_proj|value_proj|dense)"
PAPER = [
    pytest.param(deberta_v3_base, 46, ENCODER, 0.08, 2, id="DeBERTaV3-base"),
    pytest.param(vit_b16, 46, "all-linear", 0.08, 2, id="ViT-B/16"),
    pytest.param(llama_3b, 352, "all-linear", 12.2, 1, id="LLaMA-3.2-3B-all"),
    pytest.param(llama_3b, 168, ["q_proj", "k_proj", "v_proj"], 1.20, 2, id="LLaMA-3.2-3B-qkv"),
    pytest.param(
        llama_8b, 424, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], 14.5, 1, id="LLaMA-3.1-8B-qkvud"
    ),
    pytest.param(llama_8b, 194, ["q_proj", "v_proj"], 1.22, 2, id="LLaMA-3.1-8B-qv"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "rank", "targets", "millions", "digits"), PAPER)
def test_parameter_counts_of_the_paper(build: Any, rank: int, targets: Any, millions: float, digits: int) -> None:
    """The #Params column of the paper's tables, on models of the real shapes without weights."""
    with torch.device("meta"):
        model = build()
    model = get_peft_model(model, PsoftConfig(r=rank, target_modules=targets))
    count = sum(
        p.numel() for layer in layers_of(model) for p in layer.adapter("default").parameters() if p.requires_grad
    )
    assert count == len(layers_of(model)) * (rank * (rank - 1) // 2 + 2 * rank)
    # The paper rounds some of its figures and cuts others off (1.2066 is printed as 1.20, 14.484 as 14.5).
    assert abs(count / 1e6 - millions) < 10**-digits


# -- dropout -------------------------------------------------------------------------------------------------------


def test_dropout_only_in_training_and_only_on_the_update() -> None:
    base = nn.Sequential(nn.Linear(24, 16))
    x = torch.randn(64, 24)
    expected = base(x).detach()
    torch.manual_seed(1)
    plain = adapt(base, r=8, target_modules=["0"])
    without = plain(x).detach()
    base = plain.unload()
    torch.manual_seed(1)
    model = adapt(base, r=8, target_modules=["0"], psoft_dropout=0.5)
    assert torch.equal(model(x), without)  # evaluation: dropout does nothing
    model.train()
    first, second = model(x).detach(), model(x).detach()
    assert not torch.equal(first, second)
    # Averaged over many masks the update is the one without dropout.
    mean = torch.stack([model(x).detach() for _ in range(400)]).mean(0)
    assert relative_error(mean - expected, without - expected) < 0.1
    randomize(model, std=0.0)
    with torch.no_grad():  # with the identity as the operator, no mask can be seen
        for parameter in trainable(model).values():
            parameter.fill_(1.0 if parameter.ndim == 1 and parameter.numel() == 8 else 0.0)
    assert torch.equal(model(x), expected)
