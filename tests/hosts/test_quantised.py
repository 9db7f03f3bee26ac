"""Quantised linear layers as hosts, by every library that is supported: PEFT's own paths, training, pins, merging."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor, nn

from helpers import (
    OPTIONS_FOR_12,
    OneLayer,
    Stack,
    adapt,
    assert_same_gradients,
    down_of,
    layers_of,
    merged_matrix,
    only,
    psoft,
    randomize,
    relative_error,
    some_tokens,
    tiny_llama,
    trainable,
)
from isotune import PsoftConfig, evaluated_once, get_peft_model
from isotune.errors import BaseMismatchError, IsotuneWarning
from isotune.files.export_lora import export_lora
from isotune.files.export_merged import export_merged
from isotune.hosts import host_for
from isotune.hosts.quantised import Functions, QuantisedHost
from isotune.methods import METHODS
from isotune.parallel.processes import sample_of
from quantisers import BY_TRANSFORMERS, OTHERS, QUANTISERS, load, parameters, quantise, save_packed

everywhere = pytest.mark.parametrize("name", parameters())


def spectral(out_features: int, in_features: int) -> nn.Linear:
    """A layer whose singular values fall as those of trained weights do, so that rounding leaves its subspace."""
    layer = nn.Linear(in_features, out_features)
    left, _, right = torch.linalg.svd(torch.randn(out_features, in_features), full_matrices=False)
    values = torch.arange(1, min(out_features, in_features) + 1) ** -0.7
    layer.weight.data = (left * values) @ right
    return layer


def adapted(method: str, name: str, **options: Any) -> Any:
    """One quantised layer with a random operator, in training mode: no library rounds its input there."""
    options = {"init_weights": False, "target_modules": ["layer"], **OPTIONS_FOR_12[method], **options}
    return get_peft_model(quantise(OneLayer(nn.Linear(192, 64)), name), METHODS[method](**options)).train()


def holds(model: nn.Module) -> list[bytes]:
    """Every byte of the tensors that a base layer consists of."""
    found: list[Tensor] = []
    pending = list(only(model).get_base_layer().state_dict().values())
    while pending:
        tensor = pending.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            pending.extend(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif isinstance(tensor, Tensor):
            found.append(tensor)
    return [tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in found]


# -- every library -----------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("method", list(METHODS))
def test_output_and_gradients_are_those_of_the_dequantised_layer(method: str, name: str) -> None:
    model = adapted(method, name)
    layer = only(model)
    assert isinstance(layer.host, QuantisedHost)
    x = torch.randn(3, 5, 192, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    found = model(x)
    parameters = list(trainable(model).values())
    bias = layer.get_base_layer().bias
    expected = nn.functional.linear(same, merged_matrix(layer), bias.detach().float())
    limit = QUANTISERS[name].precision
    assert relative_error(found.detach(), expected.detach()) < limit
    cotangent = torch.randn_like(found)
    expected_gradients = torch.autograd.grad(expected, [same, *parameters], cotangent)
    for one, other in zip(torch.autograd.grad(found, [x, *parameters], cotangent), expected_gradients, strict=True):
        assert relative_error(one, other) < limit


@everywhere
@pytest.mark.parametrize("method", list(METHODS))
def test_merge_reports_or_refuses_and_unmerge_restores_every_byte(method: str, name: str) -> None:
    model = adapted(method, name)
    layer, x = only(model), torch.randn(3, 192)
    before, weight, expected = holds(model), layer.host.weight, model(x).detach()
    if not QUANTISERS[name].merges:
        with pytest.raises(ValueError, match=r"'layer' is quantised by .*cannot be merged"):
            model.merge_adapter()
        with pytest.raises(ValueError, match=r"'layer' is quantised by .*cannot be merged"):
            model.merge_and_unload()
        assert not layer.merged
    else:
        wanted = merged_matrix(layer).detach()
        with pytest.warns(IsotuneWarning, match="quantised again"):
            model.merge_adapter()
        assert holds(model) != before
        assert 0 < layer.requantised.of_weight < QUANTISERS[name].residue
        assert relative_error(layer.host.matrix(), wanted) < QUANTISERS[name].residue
        assert relative_error(model(x).detach(), expected) < 1.5 * QUANTISERS[name].residue
        model.unmerge_adapter()
    assert layer.host.weight is weight
    assert holds(model) == before
    assert torch.equal(model(x), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.covered(method=("psoft",))
@pytest.mark.parametrize("name", parameters(*BY_TRANSFORMERS))
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_trained_saved_and_loaded_as_transformers_users_do(
    method: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps on a base that transformers has quantised but for some layers, then a fresh base with the file."""
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # packing compiles for minutes else
    if name == "gptqmodel-awq":
        folder = tmp_path / "packed"
        save_packed(tiny_llama(), folder)
    base = prepare_model_for_kbit_training(load(folder, name), use_gradient_checkpointing=method == "oft")
    tokens = some_tokens(4, 12)
    plain = base.eval()(tokens).logits.detach()
    options = {"psoft": {"r": 8}, "oft": {"oft_block_size": 8}}[method]
    left = {"o_proj", *(("gate_proj", "up_proj", "down_proj") if name == "gptqmodel-gptq" else ())}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = linear if name.startswith("gptqmodel") else "all-linear"
    model = get_peft_model(base, METHODS[method](target_modules=targets, task_type="CAUSAL_LM", **options))
    kinds = {layer.key.rpartition(".")[2]: isinstance(layer.host, QuantisedHost) for layer in layers_of(model)}
    assert kinds == {name: name not in left for name in linear}
    status = {layer.name.rpartition(".")[2]: layer.quantization_backend for layer in model.get_layer_status()}
    assert status["o_proj"] is None
    package = QUANTISERS[name].package
    assert status["q_proj"].startswith(
        {"bitsandbytes": "bnb", "optimum.quanto": "optimum-quanto"}.get(package, package)
    )
    train_save_and_load(model, plain, tokens, load(folder, name), tmp_path / "adapter", name)


def train_save_and_load(model: Any, plain: Tensor, tokens: Tensor, again: nn.Module, folder: Path, name: str) -> None:
    """Twenty steps leave the base alone and change the output, and a fresh base with the file gives the same.

    Merging then is refused, or changes what it must and is undone.
    """
    before = [layer.host.matrix().clone() for layer in layers_of(model)]
    losses = []
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(20):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    trained = model.eval()(tokens).logits.detach()
    for layer, matrix in zip(layers_of(model), before, strict=True):
        assert torch.equal(layer.host.matrix(), matrix)
    assert relative_error(trained, plain) > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, plain)
    model.save_pretrained(folder)
    fresh = PeftModel.from_pretrained(again, folder).eval()
    # Where evaluation rounds inputs to 8 bits, a last bit may tip one of them.
    limit = 2e-2 if QUANTISERS[name].rounds_inputs else 1e-3
    assert relative_error(fresh(tokens).logits.detach(), trained) < limit
    for one, other in zip(layers_of(fresh), layers_of(model), strict=True):
        assert relative_error(one.get_delta_weight("default"), other.get_delta_weight("default")) < 1e-3
    if not QUANTISERS[name].merges:
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter()
    else:
        wanted = [merged_matrix(layer).detach() for layer in layers_of(model)]
        with pytest.warns(IsotuneWarning, match="quantised again"):
            model.merge_adapter()
        for layer, matrix in zip(layers_of(model), wanted, strict=True):
            error = 0.0 if layer.requantised is None else layer.requantised.of_weight
            assert relative_error(layer.host.matrix(), matrix) == pytest.approx(error, rel=1e-3, abs=1e-6)
            assert error < (0.4 if layer.host.quantised else 1e-6)
        model.unmerge_adapter()
    for layer, matrix in zip(layers_of(model), before, strict=True):
        assert torch.equal(layer.host.matrix(), matrix)
    assert torch.equal(model(tokens).logits, trained)


@pytest.mark.parametrize("name", parameters(*[n for n in OTHERS if not n.startswith(("bitsandbytes", "torchao"))]))
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_trained_saved_and_loaded_on_a_model_quantised_by_hand(method: str, name: str, tmp_path: Path) -> None:
    tokens = some_tokens(4, 12)
    base, again = (quantise(tiny_llama(), name, "gate_proj", "up_proj", "down_proj", "lm_head") for _ in range(2))
    plain = base.eval()(tokens).logits.detach()
    options = {"psoft": {"r": 8}, "oft": {"oft_block_size": 8}}[method]
    model = get_peft_model(base, METHODS[method](target_modules=["q_proj", "v_proj", "up_proj"], **options))
    assert [isinstance(layer.host, QuantisedHost) for layer in layers_of(model)] == [True, True, False] * 2
    train_save_and_load(model, plain, tokens, again, tmp_path, name)


@everywhere
def test_processes_can_compare_their_weights(name: str) -> None:
    first, second = (sample_of(only(adapted("oft", name)).host.weight) for _ in range(2))
    assert 32 <= len(first) <= 64
    assert len(set(first)) > 4
    assert first != second


# -- what the pin says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "torchao-int4"])
def test_an_adapter_of_a_four_bit_base_is_refused_on_the_base_itself_and_on_other_bits(
    name: str, tmp_path: Path
) -> None:
    base = OneLayer(spectral(64, 96))
    other = {"bitsandbytes-nf4": "torchao-int4", "torchao-int4": "bitsandbytes-nf4"}[name]
    model = adapt(quantise(base, name), psoft(r=8, target_modules=["layer"]))
    x = torch.randn(5, 96)
    model.save_pretrained(tmp_path / "pinned")
    same = PeftModel.from_pretrained(quantise(base, name), tmp_path / "pinned").eval()
    assert relative_error(same(x).detach(), model(x).detach()) < 1e-5
    for wrong in (copy.deepcopy(base), quantise(base, other)):
        with pytest.raises(BaseMismatchError, match="quantised in the same way"):
            PeftModel.from_pretrained(wrong, tmp_path / "pinned")
    embedded = adapt(quantise(base, name), psoft(r=8, target_modules=["layer"], basis="embedded"))
    embedded.save_pretrained(tmp_path / "embedded")
    for fitting in (copy.deepcopy(base), quantise(base, other)):
        loaded = PeftModel.from_pretrained(fitting, tmp_path / "embedded").eval()
        assert torch.equal(only(loaded).bases("default")[0].stored, only(embedded).bases("default")[0].stored)


def test_the_pin_takes_eight_bits_for_the_base_itself(tmp_path: Path) -> None:
    """Rounding to 8 bits moves the subspace of a falling spectrum by less than what is still the same base."""
    base = OneLayer(spectral(64, 96))
    model = adapt(quantise(base, "torchao-int8"), psoft(r=8, target_modules=["layer"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert 1e-6 < only(loaded).adapter("default").placement.residual < 0.03
    assert relative_error(only(loaded).get_delta_weight("default"), only(model).get_delta_weight("default")) < 5e-2


@pytest.mark.filterwarnings("ignore:.*quantised again")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_a_model_on_a_base_by_torchao_is_moved(method: str, merged: bool) -> None:
    """Trainer and accelerate do so before the first step."""
    model = adapt(quantise(OneLayer(spectral(64, 64)), "torchao-int8"), METHODS[method](target_modules=["layer"]))
    randomize(model)
    x = torch.randn(5, 64)
    if merged:
        model.merge_adapter()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(model.to("cpu")(x), expected)
        assert relative_error(model.to(torch.bfloat16)(x.bfloat16()).float(), expected) < 2e-2
    inner = model.unload()
    inner.to("meta")
    assert inner.layer.weight.is_meta


@pytest.mark.filterwarnings("ignore:.*quantised again")
def test_unmerging_follows_a_cast() -> None:
    model = adapt(quantise(OneLayer(spectral(64, 64)), "torchao-int4"), psoft(r=8, target_modules=["layer"]))
    randomize(model)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        model.to(torch.bfloat16)
        model.unmerge_adapter()
        assert relative_error(model(x.bfloat16()).float(), expected) < 2e-2


@pytest.mark.parametrize("name", parameters("bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8"))
@pytest.mark.parametrize("method", METHODS)
def test_autocast_over_layers_that_return_single_precision(method: str, name: str) -> None:
    """As `Trainer(bf16=True)` on a base by `prepare_model_for_kbit_training`."""
    model, x = adapted(method, name), torch.randn(5, 192)
    wide = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    expected = wide(x)
    assert relative_error(output.float(), expected) < 2e-2
    for each, found in ((model, output), (wide, expected)):
        found.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable(each).values())
    assert_same_gradients(model, wide, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_torchao_quantises_in_place_is_followed(method: str, kind: str, bias: bool) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    base = OneLayer(spectral(64, 192))
    base.layer.bias = nn.Parameter(torch.randn(64)) if bias else None
    options = {"target_modules": ["layer"], "init_weights": False, **OPTIONS_FOR_12[method]}
    model, x = get_peft_model(copy.deepcopy(base), METHODS[method](**options)).eval(), torch.randn(5, 192)
    with torch.no_grad():
        expected = model(x)
        for one in (base, model):
            quantisation.quantize_(one, getattr(quantisation, kind)())
        assert relative_error(model(x), expected) < 0.05
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
    with pytest.raises(ValueError, match="cannot be written back"):
        model.merge_adapter()


@pytest.mark.parametrize("name", parameters("bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8"))
@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_is_dequantised_is_followed(method: str, name: str) -> None:
    model, x = adapted(method, name).eval(), torch.randn(5, 192)
    layer = only(model)
    plain = nn.Linear(192, 64)
    with torch.no_grad():
        plain.weight.copy_(layer.host.matrix())
        plain.bias.copy_(layer.get_base_layer().bias)
        expected = model(x)
        layer.base_layer = plain
        found = model(x)
        assert relative_error(found, expected) < 0.02
        model.merge_adapter()
        assert relative_error(model(x), found) < 1e-5


def test_a_layer_that_gives_its_input_no_gradient_is_refused_for_training() -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    base = OneLayer(nn.Linear(64, 64))
    quantisation.quantize_(base, quantisation.Int8DynamicActivationInt8WeightConfig())
    for method in ("psoft", "oft"):
        with pytest.raises(ValueError, match=r"'layer' is quantised together with its inputs.*Int8WeightOnlyConfig"):
            get_peft_model(copy.deepcopy(base), METHODS[method](target_modules=["layer"]))
        served = METHODS[method](target_modules=["layer"], inference_mode=True)
        model = get_peft_model(copy.deepcopy(base), served)
        assert model(torch.randn(2, 64)).shape == (2, 64)
        with pytest.raises(ValueError, match=r"'layer' is quantised together with its inputs"):
            model.add_adapter("trained", METHODS[method](target_modules=["layer"]))
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("served_first", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_quantised_in_place_with_its_inputs_serves_and_is_not_trained(method: str, served_first: bool) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    options = {"target_modules": ["layer"], "init_weights": False, **OPTIONS_FOR_12[method]}
    model, x = get_peft_model(OneLayer(spectral(64, 192)), METHODS[method](**options)).train(), torch.randn(5, 192)
    with torch.no_grad():
        expected = model(x)
    quantisation.quantize_(model, quantisation.Int8DynamicActivationInt8WeightConfig())
    if served_first:
        with torch.no_grad():
            assert relative_error(model.eval()(x), expected) < 0.05
    for _ in range(2):
        with pytest.raises(ValueError, match="'layer' is quantised together with its inputs"):
            model.train()(x)
    with torch.no_grad():
        assert relative_error(model.eval()(x), expected) < 0.05


def test_a_quantised_layer_exchanged_for_its_copy_can_be_merged() -> None:
    model = adapt(quantise(OneLayer(spectral(64, 64)), "torchao-int8"), psoft(r=8, target_modules=["layer"]))
    layer = only(model)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    with pytest.warns(IsotuneWarning, match="quantised again"):
        model.merge_adapter()


# -- subspaces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", parameters("bitsandbytes-nf4", "bitsandbytes-int8"))
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_evaluated_once_leaves_packed_weights_to_the_first_pass(method: str, name: str) -> None:
    model = adapt(quantise(OneLayer(spectral(64, 64)), name), METHODS[method](target_modules=["layer"])).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        with evaluated_once(model):
            assert torch.equal(model(x), expected)


def test_the_subspace_is_that_of_the_dequantised_weight() -> None:
    model = adapt(quantise(OneLayer(spectral(40, 64)), "bitsandbytes-nf4"), psoft(r=6, target_modules=["layer"]))
    layer = only(model)
    _, _, right = torch.linalg.svd(layer.host.matrix())
    angles = torch.linalg.svdvals(down_of(layer, "default") @ right[:6].T)
    assert float((angles - 1).abs().max()) < 1e-5


def test_one_dequantised_weight_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    original = QuantisedHost.matrix

    def watched(host: QuantisedHost) -> Tensor:
        nonlocal most
        matrix = original(host)
        alive.append(weakref.ref(matrix))
        most = max(most, sum(one() is not None for one in alive))
        return matrix

    base = quantise(Stack(64), "torchao-int8")
    monkeypatch.setattr(QuantisedHost, "matrix", watched)
    model = adapt(base, psoft(target_modules=["first", "second", "third"]))
    assert len(alive) >= 3
    assert most == 1
    counted = len(alive)
    model(torch.randn(2, 64))
    assert len(alive) == counted


# -- merging -----------------------------------------------------------------------------------------------------


def test_a_model_of_which_one_layer_cannot_be_merged_is_left_as_it_was() -> None:
    base = quantise(Stack(64), "torchao-int8", "second")
    del base.hf_quantizer  # quantised by hand, so nobody knows how to quantise again
    model = adapt(base, psoft(target_modules=["second", "first"]))
    weights = [layer.host.weight for layer in layers_of(model)]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'first' is quantised by torchao.*TorchAoConfig"):
            merge()
        assert [layer.merged for layer in layers_of(model)] == [False, False]
        assert all(layer.host.weight is weight for layer, weight in zip(layers_of(model), weights, strict=True))


def test_what_merging_changed_is_said_once_for_the_whole_model() -> None:
    model = adapt(quantise(Stack(64), "bitsandbytes-nf4", "third"), psoft(target_modules=["first", "second", "third"]))
    with pytest.warns(IsotuneWarning, match=r"merged weights of 2 layers .* (0\.0\d|0\.1)\d* of their norm") as caught:
        model.merge_adapter()
    assert len([w for w in caught if issubclass(w.category, IsotuneWarning)]) == 1
    with_figures = {layer.key for layer in layers_of(model) if layer.requantised is not None}
    assert with_figures == {"first", "second"}
    model.unmerge_adapter()
    assert all(layer.requantised is None for layer in layers_of(model))


def test_adapters_merged_one_after_the_other_start_from_the_base() -> None:
    model = adapt(quantise(OneLayer(spectral(64, 64)), "bitsandbytes-nf4"), psoft(r=8, target_modules=["layer"]))
    model.add_adapter("second", psoft(r=8, target_modules=["layer"]))
    layer, before = only(model), holds(model)
    layer.merge(adapter_names=["default", "second"])
    at_once = layer.host.matrix()
    layer.unmerge()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    torch.testing.assert_close(layer.host.matrix(), at_once)
    layer.unmerge()
    assert holds(model) == before


def test_a_trained_bias_stays_the_same_parameter_while_merged() -> None:
    model = adapt(quantise(Stack(64), "bitsandbytes-nf4"), psoft(target_modules=["first"], bias="all"))
    bias = only(model).get_base_layer().bias
    assert bias.requires_grad
    only(model).merge()
    assert only(model).get_base_layer().bias is bias
    only(model).unmerge()
    assert only(model).get_base_layer().bias is bias


def test_a_layer_goes_on_after_a_copy_was_merged() -> None:
    """bitsandbytes' parameter knows its layer and marks the weight that PEFT replaces; a copy must have its own."""
    model = adapt(quantise(OneLayer(nn.Linear(64, 64)), "bitsandbytes-nf4"), psoft(target_modules=["layer"]))
    x = torch.randn(3, 64)
    expected, before = model(x).detach(), holds(model)
    layer = only(model).get_base_layer()
    only(model).merge()
    assert layer.weight.module is layer
    only(model).unmerge()
    assert layer.weight.module is layer
    assert layer.weight.quant_state is layer.quant_state
    model.to("cpu")  # quantises what is marked as not quantised yet
    assert holds(model) == before
    assert torch.equal(model(x), expected)


# -- exports -----------------------------------------------------------------------------------------------------


def test_export_to_lora_fits_the_quantised_base(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(folder, "bitsandbytes-nf4"), PsoftConfig(r=8, target_modules="all-linear")).eval()
    randomize(model)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(folder, "bitsandbytes-nf4"), tmp_path / "lora").eval()
    assert relative_error(lora(some_tokens()).logits.detach(), model(some_tokens()).logits.detach()) < 1e-4


def test_export_merged_writes_what_the_merged_model_computes(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = get_peft_model(load(folder, "bitsandbytes-nf4"), PsoftConfig(r=8, target_modules="all-linear")).eval()
    randomize(model)
    tokens = some_tokens()
    unmerged = model(tokens).logits.detach()
    with pytest.warns(IsotuneWarning, match="quantised again"):
        export_merged(model, tmp_path / "merged")
    assert torch.equal(model(tokens).logits, unmerged)
    with pytest.warns(IsotuneWarning, match="quantised again"):
        model.merge_adapter()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(merged(tokens).logits.detach(), model(tokens).logits.detach()) < 1e-3


# -- refusals and traps ------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A layer of a library that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int32), requires_grad=False)


def test_a_library_that_is_not_supported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packed, "__module__", "somelibrary.nn")
    with pytest.raises(ValueError, match=r"'layer' is a somelibrary\.nn\.Packed.*bitsandbytes.*torchao"):
        get_peft_model(OneLayer(Packed()), psoft(target_modules=["layer"]))
    eight = nn.Linear(64, 32)
    eight.weight = nn.Parameter(eight.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*float8"):
        get_peft_model(OneLayer(eight), psoft(target_modules=["layer"]))


@pytest.mark.slow
def test_aqlm_with_small_codebooks_is_refused_on_a_cpu() -> None:
    aqlm = pytest.importorskip("aqlm", reason="see requirements/")
    base = OneLayer(aqlm.QuantizedLinear(16, 8, 4, 1, 2, 8))
    with pytest.raises(ValueError, match=r"'layer'.*aqlm with codebooks of 8 bits.*codebooks of 16 bits"):
        get_peft_model(base, psoft(target_modules=["layer"]))


@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_eetq_as_transformers_loads_it_is_refused(method: str) -> None:
    from transformers.integrations.eetq import EetqLinear

    base = OneLayer(EetqLinear(12, 8))
    with pytest.raises(ValueError, match=r"'layer' is a transformers\.integrations\.eetq\.EetqLinear.*Supported"):
        get_peft_model(base, METHODS[method](target_modules=["layer"]))
    assert type(base.layer) is EetqLinear


@pytest.mark.parametrize("library", ["eetq", "inc"])
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_a_library_whose_weights_peft_cannot_read_is_named(
    method: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("peft.utils.quantization_utils", reason="PEFT reads quantised weights from 0.20 on")
    monkeypatch.setattr(
        "isotune.tuner.quantisation.resolve_quantization_backend",
        lambda *_, **__: utils.ForwardOnlyQuantizationBackend(library),
    )
    base = OneLayer(Packed())
    with pytest.raises(ValueError, match=rf"'layer'.*{library}.*Supported.*Quantise the base"):
        get_peft_model(base, METHODS[method](target_modules=["layer"]))
    assert type(base.layer) is Packed


def test_a_layer_that_is_not_quantised_yet_is_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in (bitsandbytes.nn.Linear4bit(64, 32), bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)):
        base = OneLayer(layer)
        with pytest.raises(ValueError, match=r"'layer', quantised by bnb .bit, cannot be dequantised.*device"):
            get_peft_model(base, psoft(target_modules=["layer"]))
        assert base.layer is layer


def test_a_weight_of_the_wrong_shape_is_refused() -> None:
    wrong = Functions("some library", lambda module: torch.zeros(3, 4))
    host = host_for(nn.Linear(3, 4), "some.name", wrong)
    with pytest.raises(ValueError, match=r"some library.*\(3, 4\).*4 × 3"):
        host.matrix()


def test_bitsandbytes_does_not_repack_a_layer_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX512-BF16, whose evaluation forward would pack the weights in place."""
    base = quantise(Stack(64), "bitsandbytes-nf4")
    packed = []
    monkeypatch.setattr(
        "bitsandbytes.nn.modules._convert_weight_packed_for_cpu",
        lambda weight, state, **_: (packed.append(weight), (weight, state))[1],
    )
    for module in base.children():
        module.support_avx512bf16_for_cpu = True
    base.eval()(torch.randn(2, 64))
    assert len(packed) == 3  # what an adapted model must not do
    packed.clear()
    model = adapt(base, psoft(target_modules=["second"]))
    with torch.no_grad():
        model.eval()(torch.randn(2, 64))
    assert packed == []  # in layers without an adapter neither: the gradient of earlier ones passes through them


def test_a_layer_that_was_repacked_before_is_brought_back() -> None:
    convert = pytest.importorskip("bitsandbytes.functional")._convert_weight_packed_for_cpu
    base = quantise(OneLayer(nn.Linear(64, 64)), "bitsandbytes-nf4")
    expected = only(adapt(copy.deepcopy(base), psoft(target_modules=["layer"]))).host.matrix()
    weight = base.layer.weight
    weight.data, weight.quant_state = convert(weight.data, weight.quant_state)
    found = only(adapt(base, psoft(target_modules=["layer"]))).host.matrix()
    assert relative_error(found, expected) < 5e-3  # the block's scales went through bfloat16


def test_plain_models_import_no_quantisation_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "isotune.tuner.quantisation.resolve_quantization_backend", lambda *_, **__: pytest.fail("asked")
    )
    adapt(Stack(), psoft(target_modules=["first"]))
