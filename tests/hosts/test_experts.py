"""Fused experts of transformers' mixtures: every method per expert, against weights folded by plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from elsewhere import asked_elsewhere
from helpers import (
    assert_unchanged,
    counted,
    down_of,
    form_of,
    layers_of,
    randomize,
    reference_complement,
    reference_restarting,
    reference_shared,
    relative_error,
    snapshot,
    some_tokens,
    trainable,
    up_of,
)
from isotune import BOFTConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.adapter.lowrank import ComplementAdapter, PlacedLowRank
from isotune.adapter.rotation import RotationAdapter
from isotune.adapter.shared import SharedAdapter
from isotune.adapter.subspace import SubspaceBasis
from isotune.algebra.factors import apply_chain
from isotune.errors import AdapterFileError, BaseMismatchError, IsotuneWarning
from isotune.files.adapter import describe
from isotune.files.export_lora import export_lora
from isotune.files.export_merged import export_merged
from isotune.hosts import ExpertsHost
from isotune.methods import METHODS
from isotune.tuner.experts_layer import ExpertsLayer
from quantisers import load

EXPERTS, HIDDEN, INNER = 5, 32, 24
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "psoft": {"r": 6},
    "oft": {"oft_block_size": 8},
    "oft-output": {"oft_block_size": 8},
    "hra": {"r": 4},
    "lora_xs": {"r": 6},
    "oplora": {"r": 6, "preserved_rank": 4},
    "rosa": {"r": 6},
    "uora": {"r": 6},
    "goft": {},
    "qgoft": {},
}
GROUPED = "grouped_mm" if Version(torch.__version__).release >= (2, 9) else "batched_mm"
"""transformers asks for torch 2.9 for it."""
IMPLEMENTATIONS = ["eager", *dict.fromkeys((GROUPED, "batched_mm"))]


def _built(family: str) -> nn.Module:
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    shared = {
        "vocab_size": 96,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "head_dim": 8,
    }
    torch.manual_seed(3)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, intermediate_size=INNER, **shared))
    if family == "qwen3_moe":
        own = {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "intermediate_size": 40}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**own, **shared))
    return GptOssForCausalLM(GptOssConfig(num_local_experts=EXPERTS, intermediate_size=INNER, **shared))


FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
_MODELS: dict[str, nn.Module] = {}


def model_of(family: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a small model of a family, built once."""
    if family not in _MODELS:
        _MODELS[family] = _built(family).eval()
        with torch.no_grad():
            for name, parameter in _MODELS[family].named_parameters():
                if "experts" in name:
                    nn.init.normal_(parameter, std=0.3)  # so that what experts do shows in the output
    model = copy.deepcopy(_MODELS[family]).to(dtype)
    model.set_experts_implementation(implementation)
    return model


def config(method: str, **options: Any) -> Any:
    name, form = form_of(method)
    return METHODS[name](**{"target_parameters": BOTH, "init_weights": False, **form, **OPTIONS[method], **options})


def adapted(family: str, method: str, implementation: str = "eager", dtype: Any = torch.float32, **options: Any) -> Any:
    torch.manual_seed(11)
    return get_peft_model(model_of(family, implementation, dtype), config(method, **options)).eval()


def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    result: Tensor = model(input_ids=some_tokens() if tokens is None else tokens).logits
    return result


def folded(layer: ExpertsLayer, parameters: dict[str, Tensor], name: str = "default") -> Tensor:
    """The parameter by the definition of the two forms, expert by expert, from an operator of one expert."""
    single = layer.configs[name].build_operator(layer.key, layer.in_features, layer.out_features).double()
    result = []
    for index, matrix in enumerate(layer.host.matrix().double()):
        own = {key: value[index] for key, value in parameters.items()}
        if isinstance(single, PlacedLowRank):
            single.lora_A, single.lora_B = None, None
            vars(single).update(own)
            reference = reference_complement if isinstance(single, ComplementAdapter) else reference_restarting
            result.append(matrix + reference(single, matrix, down_of(layer, name)[index].double()))
            continue
        if isinstance(single, SharedAdapter):
            single.vera_lambda_d, single.vera_lambda_b = None, None
            vars(single).update(own)
            result.append(matrix + reference_shared(single, matrix))
            continue
        eye = torch.eye(single.size, dtype=torch.float64)
        tensors = single.evaluate(own)
        if isinstance(single, RotationAdapter):
            turning = apply_chain(eye, single.chain, tensors)
            result.append(turning @ matrix if single.side == "output" else matrix @ turning.T)
        else:
            up, down = up_of(layer, name)[index].double(), down_of(layer, name)[index].double()
            result.append(matrix + up @ tensors[0].T @ down)
    return layer.host.stored(torch.stack(result))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(OPTIONS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- the function ----------------------------------------------------------------------------------------------------


def test_identity_at_the_start(family: str, method: str) -> None:
    expected = logits(model_of(family)).detach()
    exact = {"init_std": 0.0} if method == "lora_xs" else {}
    model = adapted(family, method, init_weights=True, **exact)
    assert len(layers_of(model)) == 4
    assert relative_error(logits(model).detach(), expected) <= (1e-6 if method == "hra" else 0)


def test_output_and_gradients_are_those_of_folded_weights(family: str, method: str) -> None:
    model = adapted(family, method, dtype=torch.float64)
    layers = {layer.key: layer for layer in layers_of(model)}
    leaves = {
        key: {n: p.detach().clone().requires_grad_() for n, p in layer.adapter("default").named_parameters()}
        for key, layer in layers.items()
    }
    weights = {key: folded(layer, leaves[key]) for key, layer in layers.items()}
    base = model_of(family, dtype=torch.float64)
    theirs = functional_call(base, weights, (), {"input_ids": some_tokens()}).logits
    ours = logits(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert relative_error(ours.detach(), logits(base).detach()) > 1e-3
    cotangent = torch.randn_like(ours)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    for key, layer in layers.items():
        for name, parameter in layer.adapter("default").named_parameters():
            assert bool(leaves[key][name].grad.any())
            torch.testing.assert_close(parameter.grad, leaves[key][name].grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("grad", [False, True])
def test_experts_that_accelerate_offloads(method: str, grad: bool) -> None:
    """Two layers on the parameters of one module, which are not here between its calls."""
    model = adapted("mixtral", method)
    expected, flags = logits(model).detach(), [p.requires_grad for p in model.parameters()]
    pytest.importorskip("accelerate").cpu_offload(model.get_base_model(), torch.device("cpu"))
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            torch.testing.assert_close(logits(model).detach(), expected)
            assert [p.requires_grad for p in model.parameters()] == flags
            assert all(layer.host.weight.is_meta for layer in layers_of(model))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_every_implementation_of_the_experts_is_the_same_function(family: str, implementation: str) -> None:
    results = []
    for chosen in ("eager", implementation):
        model = adapted(family, "psoft", chosen)
        assert model.config._experts_implementation == chosen
        output = logits(model)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in trainable(model).values())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["psoft", "oft", "hra"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_experts_that_are_reached_are_computed(
    method: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the operator nor the weight of another has a part: they hold NaN, and no product has their number."""
    model = adapted("mixtral", method, implementation)
    experts = model.base_model.model.model.layers[0].mlp.experts
    index = torch.tensor([[1, 3], [3, 1], [3, 1], [1, 3]])
    x, weights = torch.randn(4, HIDDEN), torch.rand(4, 2)
    expected = experts(x, index, weights).detach()
    operators = [layer.adapter("default") for layer in (experts, experts.base_layer)]
    with torch.no_grad():
        for layer in (experts, experts.base_layer):
            others = torch.tensor([0, 2, 4])
            layer.host.weight[others] = float("nan")
            for parameter in layer.adapter("default").parameters():
                parameter[others] = float("nan")
    kind = type(operators[0])
    with counted(monkeypatch, f"{kind.__module__}.{kind.__name__}.evaluate") as calls:
        found = experts(x, index, weights)
    assert [next(iter(call[1].values())).shape[1] for call in calls] == [2, 2]  # of five; a batch of one in front
    assert torch.equal(found, expected)
    found.square().sum().backward()
    for operator in operators:
        for parameter in operator.parameters():
            assert bool(parameter.grad[[1, 3]].any())
            assert not parameter.grad[[0, 2, 4]].any()


@pytest.mark.skipif(GROUPED != "grouped_mm", reason="the grouped product of experts asks for torch 2.9")
def test_no_tokens_and_tokens_of_another_device() -> None:
    """Numbers beyond the experts stand for those of another device, which transformers skips."""
    model = adapted("mixtral", "oft")
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert experts(torch.randn(0, HIDDEN), torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2)).shape == (0, HIDDEN)
    x, weights = torch.randn(3, HIDDEN), torch.rand(3, 2)
    places = torch.tensor([[0, EXPERTS], [EXPERTS, 2], [0, 2]])
    try:
        model_of("mixtral").model.layers[0].mlp.experts(x, places, weights)
    except RuntimeError:
        pytest.skip("the experts of this transformers take no such numbers themselves")
    found = experts(x, places, weights)
    alone = experts(x[:1], torch.tensor([[0, EXPERTS]]), weights[:1])
    torch.testing.assert_close(found[:1], alone)


def test_half_precision_folds_in_float32() -> None:
    wide = adapted("mixtral", "psoft")
    half = copy.deepcopy(wide).bfloat16()
    assert all(p.dtype == torch.bfloat16 for n, p in half.named_parameters() if "experts.gate" in n)
    assert relative_error(logits(half).detach(), logits(wide).detach()) < 5e-2
    with pytest.warns(IsotuneWarning, match="input_scale and output_scale .* trained in bfloat16"):
        logits(half.train())
    layer, exact = layers_of(half)[0], layers_of(wide)[0]
    found = layer.host.stored(layer.get_delta_weight("default"))
    assert found.dtype == torch.float32
    assert relative_error(found, exact.host.stored(exact.get_delta_weight("default"))) < 3e-2


def test_training_moves_every_reached_expert_and_nothing_else(family: str) -> None:
    model = adapted(family, "psoft", GROUPED, init_weights=True).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-2)
    tokens, losses = some_tokens(4, 12), []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def step(model: nn.Module) -> list[Tensor]:
    """The loss of a step and the gradients."""
    model.zero_grad()
    loss = model(input_ids=some_tokens(), labels=some_tokens(), use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in trainable(model).values())]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = adapted("mixtral", "psoft", GROUPED).train()
    expected = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for found, right in zip(step(model), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_one_graph_with_torch_compile() -> None:
    """All experts are folded then, as which are reached is not known."""
    torch._dynamo.reset()
    model = adapted("mixtral", "psoft", GROUPED).train()
    expected = step(model)
    for found, right in zip(step(torch.compile(model, backend="aot_eager", fullgraph=True)), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_autocast_and_generation() -> None:
    model = adapted("mixtral", "psoft", GROUPED)
    expected = logits(model).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(logits(model).detach(), expected) < 3e-2
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=some_tokens(), **options)
    assert torch.equal(found, model.merge_and_unload().generate(input_ids=some_tokens(), **options))


def test_the_number_of_parameters() -> None:
    model = adapted("mixtral", "psoft")
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == 2 * 2 * EXPERTS * (15 + 12)
    assert all("experts" in name for name in trainable(model))


def test_layers_and_experts_together() -> None:
    model = adapted("mixtral", "psoft", target_modules=["q_proj", "v_proj"])
    assert [type(layer).__name__ for layer in layers_of(model)].count("ExpertsLayer") == 4
    assert len(layers_of(model)) == 8


# -- merging, files, several adapters --------------------------------------------------------------------------------


def test_merge_and_unmerge(family: str, method: str) -> None:
    model = adapted(family, method)
    expected = logits(model).detach()
    before = [(layer.host.weight, layer.host.weight.detach().clone()) for layer in layers_of(model)]
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in layers_of(model))
    assert relative_error(logits(model).detach(), expected) < 1e-5
    model.unmerge_adapter()
    for layer, (parameter, value) in zip(layers_of(model), before, strict=True):
        assert layer.host.weight is parameter
        assert torch.equal(parameter, value)
    assert torch.equal(logits(model), expected)
    plain = model.merge_and_unload()
    assert layers_of(plain) == []
    assert type(plain.model.layers[0].mlp.experts) is type(model_of(family).model.layers[0].mlp.experts)
    assert plain.state_dict().keys() == model_of(family).state_dict().keys()
    assert relative_error(logits(plain).detach(), expected) < 1e-5


def test_unload_gives_the_base_back(family: str) -> None:
    expected = logits(model_of(family)).detach()
    assert torch.equal(logits(adapted(family, "psoft").unload()), expected)


@pytest.mark.parametrize(
    ("method", "basis"), [("psoft", "pinned"), ("psoft", "embedded"), ("oft", None), ("hra", None)]
)
def test_save_and_load(family: str, method: str, basis: str | None, tmp_path: Path) -> None:
    model = adapted(family, method, init_weights=True, **({} if basis is None else {"basis": basis}))
    randomize(model, std=0.3)
    expected = logits(model).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_of(family), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)
    if basis is not None:
        forms = layers_of(loaded)[0].isotune_form["default"].modules()
        assert sum(isinstance(form, SubspaceBasis) for form in forms) == EXPERTS
    if basis == "pinned":
        other = model_of(family)
        with torch.no_grad():
            other.model.layers[1].mlp.experts.down_proj[2].normal_()
        before = snapshot(other)
        with pytest.raises(BaseMismatchError, match=r"layers\.1\.mlp\.experts\.down_proj"):
            PeftModel.from_pretrained(other, tmp_path)
        assert_unchanged(other, before)


def test_a_file_whose_bases_have_the_adapter_s_name_is_read(family: str, tmp_path: Path) -> None:
    """As the first release wrote them."""
    model = adapted(family, "psoft")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {name.replace("isotune_form.", "isotune_form.default."): t for name, t in load_file(file).items()}
    assert any("isotune_form.default.forms.0.pin" in name for name in old)
    save_file(old, file)
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(model_of(family), tmp_path, adapter_name=name).eval()
        torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=1e-3, atol=1e-4)


def test_several_adapters(family: str) -> None:
    base = logits(model_of(family)).detach()
    model = adapted(family, "psoft")
    first = logits(model).detach()
    model.add_adapter("other", config("psoft", r=4))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model).detach()
    assert relative_error(second, first) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model).detach()
    model.merge_adapter()
    assert relative_error(logits(model).detach(), both) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if "other" in name]
    names = ["default", "default"]
    assert torch.equal(model(input_ids=some_tokens(), adapter_names=names).logits, first)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (PsoftConfig(r=25, target_parameters=BOTH), r"r=25 is too large .*down_proj"),
        (BOFTConfig(target_parameters=BOTH), "gains"),
        (OFTConfig(oft_block_size=8, module_dropout=0.1, target_parameters=BOTH), "Dropout of blocks"),
        (PsoftConfig(r=4, psoft_dropout=0.1, target_parameters=BOTH), "psoft_dropout=0.1"),
        (PsoftConfig(r=4, target_parameters=["gate.weight"]), "3 dimensions"),
        (PsoftConfig(r=4, target_parameters=["q_proj.weight"], target_modules=["q_proj"]), "adapted as a layer"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(options: Any, said: str) -> None:
    model = model_of("mixtral")
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, options)
    assert_unchanged(model, before)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a list"):
        PsoftConfig(target_parameters="experts.down_proj")  # type: ignore[arg-type]
    model = adapted("mixtral", "psoft")
    with pytest.raises(ValueError, match="the same parameters"):
        model.add_adapter("other", config("psoft", target_parameters=BOTH[:1]))
    model.add_adapter("other", config("psoft"))
    with pytest.raises(ValueError, match="cannot mix default, other"):
        model(input_ids=some_tokens(), adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="cannot be averaged yet"):
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    with pytest.raises(ValueError, match="cannot be scaled"):
        layers_of(model)[0].set_scale("default", 0.5)
    model.save_pretrained(tmp_path / "adapter")
    file = describe(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="experts"):
        file.operator(next(iter(file.layers)))
    with pytest.raises(ValueError, match="experts"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", base=model_of("mixtral"))
    assert not (tmp_path / "lora").exists()


@pytest.mark.slow
def test_the_merged_export_is_read_without_isotune(family: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, method)
    with torch.no_grad():
        expected = logits(model)
        assert relative_error(expected, logits(model_of(family))) > 1e-2
    model_of(family).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"))
    save_file({"input_ids": some_tokens(), "expected": expected.contiguous()}, tmp_path / "batch.safetensors")
    (error,) = asked_elsewhere(place=str(tmp_path), base=None, loader="AutoModelForCausalLM", labels=[])
    assert error < 1e-4
    before = snapshot(model)
    export_merged(model, tmp_path / "live")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("live", "merged")]
    torch.testing.assert_close(*files)


# -- quantised bases -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-int8"])
def test_experts_beside_layers_that_bitsandbytes_has_quantised(name: str, tmp_path: Path) -> None:
    """transformers leaves fused experts as they are; adapters on them and on quantised layers train together."""
    model_of("mixtral").save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj", "v_proj"], "init_weights": True}
    model = get_peft_model(load(tmp_path / "base", name), config("psoft", **options)).train()
    hosts = {layer.key.rpartition(".")[2]: layer.host for layer in layers_of(model)}
    assert hosts["q_proj"].quantised
    assert hosts["gate_up_proj"].weight.dtype == torch.float32
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-2)
    for _ in range(4):
        step(model)
        optimizer.step()
    expected = logits(model.eval()).detach()
    with model.disable_adapter():
        assert relative_error(logits(model).detach(), expected) > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(tmp_path / "base", name), tmp_path / "adapter").eval()
    limit = 2e-2 if name.endswith("int8") else 1e-3  # where inputs are rounded to 8 bits in evaluation
    assert relative_error(logits(loaded).detach(), expected) < limit
    with pytest.warns(IsotuneWarning, match="merged weights of 4 layers were quantised again"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def _by_torchao(module: nn.Module) -> None:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    quantize_(module, FqnToConfig({"gate_up_proj": Int8WeightOnlyConfig()}), filter_fn=None)


def _by_bitsandbytes(module: nn.Module) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    replace_parameter_4bit(module, "gate_up_proj", quant_type="nf4")


@pytest.mark.parametrize(("quantise", "library"), [(_by_torchao, "torchao"), (_by_bitsandbytes, "bitsandbytes")])
def test_quantised_experts_are_refused(quantise: Callable[[nn.Module], None], library: str) -> None:
    pytest.importorskip(library)
    model = model_of("mixtral")
    for layer in model.model.layers:
        quantise(layer.mlp.experts)
    before = logits(model).detach()
    assert relative_error(before, logits(model_of("mixtral")).detach()) > 1e-4
    with pytest.raises(ValueError, match=rf"experts\.gate_up_proj.* {library}\."):
        get_peft_model(model, config("psoft"))
    assert torch.equal(logits(model), before)
    assert layers_of(model) == []
    get_peft_model(model, config("psoft", target_parameters=BOTH[1:]))  # the others can be adapted


def test_a_module_that_does_not_say_its_layout_is_refused() -> None:
    module = nn.Module()
    module.weights = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="is_transposed"):
        ExpertsHost(module, "block.experts.weights", "weights")
