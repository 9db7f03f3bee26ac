"""The plan of a fine-tuning against the real thing: counts, files and kept bytes of small models."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import FAMILIES, layers_of, some_tokens, tiny_llama
from isotune.experiments import registry
from isotune.experiments.files import write_json
from isotune.experiments.measure import Kept, kept_bytes
from isotune.experiments.methods import attach
from isotune.experiments.planning import estimate, measured
from isotune.experiments.planning.estimate import estimate as plan
from isotune.experiments.planning.formula import adapter_activations
from isotune.experiments.planning.measured import Measured
from isotune.experiments.planning.setting import ACCELERATORS, ASSUMED_UTILIZATION, Setting, parse_options
from isotune.experiments.planning.show import to_text
from isotune.experiments.planning.trace import trace
from isotune.experiments.recipe import Method
from isotune.internals.torch_state import GROUPED_PRODUCT

BATCH, LENGTH = 2, 24
METHODS: list[tuple[str, dict[str, Any]]] = [  # the first three on every architecture, the others on Llama
    ("psoft", {"r": 8}),
    ("oft", {"oft_block_size": 8}),
    ("lora", {"r": 4}),
    ("psoft", {"r": 8, "basis": "embedded", "target_modules": ["q_proj"]}),
    ("lora_xs", {"r": 8}),
    ("oplora", {"r": 8}),
    ("rosa", {"r": 8}),
    ("uora", {"r": 8}),
    ("hra", {"r": 4}),
    ("full", {}),
]


def tiny_t5() -> nn.Module:
    """Its attention adds a bias by position, and the decoder's second one reads the encoder's output."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, dropout_rate=0.0, decoder_start_token_id=0, **sizes))


def tiny_bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes: dict[str, Any] = {"d_model": 64, "max_position_embeddings": 64, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 112}
    return BartForConditionalGeneration(BartConfig(vocab_size=96, **sizes))


PAIRS = {"t5": tiny_t5, "bart": tiny_bart}  # of an encoder and a decoder
ALL = {**FAMILIES, **PAIRS}
CASES = [(family, *case) for family in ALL for case in (METHODS if family == "llama" else METHODS[:3])]


def folder(model: nn.Module, to: Path) -> str:
    """A folder with the configuration of a model and nothing else."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(to)
    return str(to)


def setting(where: str, method: str = "psoft", options: dict[str, Any] | None = None, **more: Any) -> Setting:
    return Setting(where, method, options or {}, **{"batch": BATCH, "sequence": LENGTH, **more})


def real(base: nn.Module, method: str, options: dict[str, Any]) -> Any:
    classifier = "SequenceClassification" in type(base).__name__
    head = ["classifier"] if "Classification" in type(base).__name__ else []
    return attach(Method(name=method, **options), copy.deepcopy(base), head, "SEQ_CLS" if classifier else None)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_counts_file_and_kept_bytes_are_those_of_the_real_model(
    family: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = ALL[family]()
    found = plan(setting(folder(base, tmp_path / "base"), method, options))
    model = real(base, method, options).train()
    if method != "full":
        trained, everything = model.get_nb_trainable_parameters()  # what print_trainable_parameters prints
        assert (found.trained_parameters, found.base_parameters) == (trained, everything - trained)
        model.save_pretrained(tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert found.adapter_file == sum(t.numel() * t.element_size() for t in tensors.values())
    else:
        assert found.trained_parameters == found.base_parameters == sum(p.numel() for p in model.parameters())
    tokens = some_tokens(BATCH, LENGTH)
    labels = tokens if family != "bert" else torch.zeros(BATCH, dtype=torch.long)
    with Kept(model) as saved:
        model(input_ids=tokens, labels=labels, **({} if family == "bert" else {"use_cache": False}))
    operators = sum(3 * 4 * t.numel() for layer in layers_of(model) for t in layer.adapter("default").tensors())
    assert saved.nbytes * 0.98 <= found.memory["kept for backward"] <= saved.nbytes * 1.02 + operators
    assert found.memory["optimiser states"] == 8 * found.trained_parameters
    assert sum(found.memory.values()) == found.total


@pytest.mark.parametrize(("method", "options"), METHODS[:3])
@pytest.mark.slow
def test_what_autocast_keeps(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Weights and inputs in half precision beside the whole ones: no share of what is kept without it."""
    base = tiny_llama(layers=2)
    where = folder(base, tmp_path)
    without, found = (plan(setting(where, method, options, autocast=on)).memory for on in (False, True))
    model, tokens = real(base, method, options).train(), some_tokens(BATCH, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_bytes(model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False))
    assert found["kept for backward"] == pytest.approx(kept, rel=0.02)
    assert without["kept for backward"] != pytest.approx(kept, rel=0.05)
    rows = ("base weights", "adapter weights", "adapter's frozen factors", "gradients", "optimiser states")
    assert [found[row] for row in rows] == [without[row] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [m for m in METHODS if m[0] not in ("lora", "full")])
def test_the_formula_of_an_adapter_s_own_activations(method: str, options: dict[str, Any]) -> None:
    """Exact but for the operators for updates; an upper bound for rotations, some of which share their input."""
    base = tiny_llama(layers=3)
    inputs = {"input_ids": some_tokens(4, 64), "labels": some_tokens(4, 64)}
    model = real(base, method, {**options, "target_modules": "all-linear"}).train()
    formula = adapter_activations(model, 4 * 64)
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.get_input_embeddings().weight.requires_grad_(True)  # so that the whole of it has a graph
    extra = trace(model, inputs).kept - trace(frozen, inputs).kept
    operators = sum(4 * 4 * t.numel() for layer in layers_of(model) for t in layer.adapter("default").tensors())
    first = 4 * 64 * 64 * 4  # the input of the first layer, which a trained embedding need not keep
    assert extra <= formula + operators
    if method in ("psoft", "lora_xs"):
        assert extra >= formula - first


def test_operations_are_those_of_the_products(tmp_path: Path) -> None:
    base = tiny_llama(layers=3)
    found = plan(setting(folder(base, tmp_path), options={"r": 8}))
    tokens = BATCH * LENGTH
    linear = [m for m in base.modules() if isinstance(m, nn.Linear)]
    frozen = sum(m.weight.numel() for m in linear)
    adapted = [m for m in linear if m is not base.lm_head]
    own = sum(2 * 8 * (m.in_features + m.out_features) + 3 * 64 for m in adapted)
    attention = 3 * BATCH * LENGTH**2 * 2 * 64
    first = (64 + 32 + 32) * 64  # the input of the first layer needs no gradient
    # Backward has one product for each frozen weight, and five for two of attention's.
    expected = 2 * (tokens * (2 * frozen - first + own) + attention * 3.5)
    assert found.operations == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """Both get sequences of the same length; the paper has no formula for them."""
    base = tiny_t5()
    found = plan(setting(folder(base, tmp_path), options={"r": 8}))
    tokens = BATCH * LENGTH
    assert found.tokens == tokens
    assert found.paper_activations is None
    assert f"encoder and decoder: {LENGTH} tokens each" in to_text(found)
    linear = [m for m in base.modules() if isinstance(m, nn.Linear)]
    own = sum(2 * 8 * (m.in_features + m.out_features) + 3 * 64 for m in linear if m is not base.lm_head)
    frozen = sum(m.weight.numel() for m in linear)
    attentions = 2 + 2 * 3  # layers of the encoder, and two for each of the decoder
    attention = attentions * BATCH * LENGTH**2 * 2 * 64
    first = 3 * 64 * 64  # the input of the first layer needs no gradient
    expected = 2 * (tokens * (2 * frozen - 2 * first + own) + attention * 3.5)
    assert found.operations == pytest.approx(expected, rel=0.02)
    kept = {}
    for checkpointing in (False, True):
        one = plan(setting(str(tmp_path), options={"r": 8}, checkpointing=checkpointing))
        kept[checkpointing] = one.memory["kept for backward"]
    assert kept[True] < kept[False]


@pytest.mark.slow
def test_a_layer_more_costs_one_input_more_under_checkpointing(tmp_path: Path) -> None:
    kept = {}
    for layers in (2, 4):
        where = folder(tiny_llama(layers=layers), tmp_path / str(layers))
        for checkpointing in (False, True):
            found = plan(setting(where, options={"r": 8}, checkpointing=checkpointing))
            kept[layers, checkpointing] = found.memory["kept for backward"], found.operations
    hidden = BATCH * LENGTH * 64 * 4
    operators = 7 * 3 * 4 * 64
    assert abs(kept[4, True][0] - kept[2, True][0] - 2 * hidden) <= 2 * operators
    assert kept[4, True][0] < kept[4, False][0]
    assert 1.2 < kept[4, True][1] / kept[4, False][1] < 1.6


def test_dtype_batch_and_sequence(tmp_path: Path) -> None:
    where = folder(tiny_llama(), tmp_path)
    one = plan(setting(where, options={"r": 8}))
    half = plan(setting(where, options={"r": 8}, dtype="bfloat16"))
    assert half.memory["base weights"] * 2 == one.memory["base weights"]
    assert half.memory["adapter weights"] == one.memory["adapter weights"]  # float32 whatever the base is
    double = plan(setting(where, options={"r": 8}, batch=2 * BATCH))
    assert double.operations == pytest.approx(2 * one.operations, rel=0.02)
    assert double.memory["kept for backward"] == pytest.approx(2 * one.memory["kept for backward"], rel=0.05)
    assert double.memory["base weights"] == one.memory["base weights"]


@pytest.mark.slow
def test_what_each_sharding_divides(tmp_path: Path) -> None:
    where = folder(tiny_llama(), tmp_path)
    one = plan(setting(where, options={"r": 8}))
    rows = {
        "ddp": [],
        "zero1": ["optimiser states"],
        "zero2": ["optimiser states", "gradients"],
        "zero3": ["optimiser states", "gradients", "adapter weights", "base weights"],
        "fsdp": ["optimiser states", "gradients", "adapter weights", "base weights"],
    }
    for sharding, divided in rows.items():
        found = plan(setting(where, options={"r": 8}, devices=4, sharding=sharding))
        for row, size in found.memory.items():
            if row != "working space":
                assert size == (-(-one.memory[row] // 4) if row in divided else one.memory[row]), (sharding, row)
        assert found.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
        base, own = one.memory["base weights"], 4 * one.trained_parameters
        assert found.sent == round(0.75 * (2 * (base + own) + own if "base weights" in divided else 2 * own))


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4.5), ("nf4-double", 4.127), ("int8", 8), ("int4", 4.25)])
def test_a_quantised_base(quantization: str, bits: float, tmp_path: Path) -> None:
    base = tiny_llama()
    found = plan(setting(folder(base, tmp_path), options={"r": 8}, quantization=quantization))
    packed = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear) and m is not base.lm_head)
    rest = sum(p.numel() for p in base.parameters()) - packed
    assert found.memory["base weights"] == pytest.approx(4 * rest + packed * bits / 8, rel=1e-4)
    assert quantization in "".join(found.assumptions)


@pytest.mark.slow
def test_the_paper_s_formulas(tmp_path: Path) -> None:
    where = folder(tiny_llama(layers=3), tmp_path)
    b, s, h, a, r = BATCH, LENGTH, 64, 4, 8
    scores = 9 * a * b * s**2
    expected = {
        "psoft": (38 * b * s * h + 72 * b * s * r + scores, {"r": r}),
        "lora_xs": (38 * b * s * h + 24 * b * s * r + scores, {"r": r}),
        "lora": (66 * b * s * h + 24 * b * s * r + scores, {"r": r}),
        "goft": (66 * b * s * h + 36 * b * s * h * 6 + scores, {}),
        "boft": (66 * b * s * h + 36 * 2 * b * s * h + scores, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    }
    for method, (bytes_of_a_layer, options) in expected.items():
        assert plan(setting(where, method, options)).paper_activations == 3 * bytes_of_a_layer
    assert plan(setting(where, "hra", {"r": 4})).paper_activations is None
    assert plan(setting(where, options={"r": r}, dtype="bfloat16")).paper_activations == 1.5 * expected["psoft"][0]


def test_a_model_of_images(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    found = plan(setting(folder(ViTForImageClassification(config), tmp_path), options={"r": 8}))
    assert found.tokens == BATCH * 17
    assert found.trained_parameters == 2 * 6 * (28 + 16) + 2 * 64 + 2  # and the classifier


def test_an_encoder_with_attention_of_its_own(tmp_path: Path) -> None:
    """DeBERTa has no fused attention, so its scores are kept; its head is trained beside the adapter."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    position = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
    base = DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=96, share_att_key=True, **sizes, **position))
    found = plan(setting(folder(base, tmp_path), options={"r": 8}))
    model = real(base, "psoft", {"r": 8}).train()
    tokens = some_tokens(BATCH, LENGTH)
    with Kept(model) as saved:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=torch.zeros(BATCH, dtype=torch.long))
    trained, everything = model.get_nb_trainable_parameters()
    assert (found.trained_parameters, found.base_parameters) == (trained, everything - trained)
    assert found.memory["kept for backward"] == pytest.approx(saved.nbytes, rel=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "psofft"}, "Did you mean 'psoft'"),
        ({"method": "head"}, "method='head'"),
        ({"devices": 0}, "devices=0"),
        ({"devices": 2, "sharding": "none"}, "needs a sharding"),
        ({"sharding": "zero4"}, "zero3"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"quantization": "nf5"}, "'nf4'"),
        ({"quantization": "nf4", "method": "full"}, "in full"),
        ({"optimizer": "adam"}, "adamw"),
        ({"accelerator": "h1000"}, "h100"),
        ({"flops": -1.0}, "flops"),
        ({"flops": math.inf}, "flops=inf is not allowed"),
        ({"flops": math.nan}, "flops=nan"),
        ({"utilization": 1.5}, "utilization=1.5"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Setting("anything", **options)


def test_models_and_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    where = folder(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="r=100 is too large"):
        plan(setting(where, options={"r": 100}))
    with pytest.raises(ValueError, match=r"did you mean 'method\.oft_block_size'"):
        plan(setting(where, "oft", {"oft_blok_size": 8}))
    with pytest.raises(ValueError, match="no folder"):
        plan(setting(str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_options(["oft_block_size"])
    assert parse_options(["r=8", "target_modules=[q_proj, v_proj]"]) == {"r": 8, "target_modules": ["q_proj", "v_proj"]}


def test_the_command(tmp_path: Path) -> None:
    where = folder(tiny_llama(), tmp_path)
    arguments = ["plan", where, "target_modules=[q_proj]", "--rank", "6", "--devices", "8", "--sequence", "16"]
    done = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["trained_parameters"] == 2 * (15 + 12)
    assert found["setting"]["options"] == {"r": 6, "target_modules": ["q_proj"]}
    assert found["total"] == sum(found["memory"].values())
    shown = CliRunner().invoke(cli.app, [*arguments, "--checkpointing", "--quantization", "nf4"]).stdout
    for line in ("assumptions", "h100: 67 TFLOP/s", "checkpointing:", "nf4: 4.5 bits", "54   ", "sent by a device"):
        assert line in shown, shown
    assert CliRunner().invoke(cli.app, ["plan", where, "--rank", "600"]).exit_code == 2
    own = plan(setting(where, options={"r": 6}, flops=1e12, utilization=0.5))
    assert own.seconds == own.operations / 0.5e12
    assert "1e+12" in to_text(own)
    assert own.total < ACCELERATORS["l4"].memory


@pytest.mark.slow
def test_measured_steps_replace_the_assumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "measured")
    where = folder(tiny_llama(), tmp_path)
    assumed = plan(setting(where, options={"r": 6}, dtype="bfloat16"))
    assert assumed.utilization == ASSUMED_UTILIZATION
    assert "assumed, not measured" in to_text(assumed)
    (tmp_path / "measured").mkdir()
    write_json(tmp_path / "measured" / "l4.json", vars(Measured("that card, these steps", "bfloat16", {"psoft": 0.25})))
    on_l4 = {"options": {"r": 6}, "dtype": "bfloat16", "accelerator": "l4"}
    found = plan(setting(where, **on_l4))
    assert found.utilization == 0.25
    assert found.seconds == found.operations / (0.25 * ACCELERATORS["l4"].half)
    assert "25% are reached (measured: that card, these steps)" in to_text(found)
    # Of anything else nothing is known.
    for other in (
        {"accelerator": "l40s"},
        {"method": "lora"},
        {"dtype": "float32"},
        {"quantization": "nf4"},
        {"flops": 1e12},
    ):
        assert plan(setting(where, **{**on_l4, **other})).utilization == ASSUMED_UTILIZATION
    assert plan(setting(where, **on_l4, utilization=0.1)).utilization == 0.1


def test_the_constants_that_the_package_holds_are_of_known_accelerators_and_methods() -> None:
    for path in measured.FOLDER.glob("*.json"):
        found = Measured.on(path.stem)
        assert path.stem in ACCELERATORS
        assert found is not None
        assert set(found.utilization) <= set(registry.entries())
        assert all(0.0 < share < 1.0 for share in found.utilization.values())


def test_a_mixture_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the experts, those that a token is sent to are multiplied; adapters on them keep a folded copy."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    where = folder(model, tmp_path)
    options = {"r": 8, "target_modules": ["q_proj"]}
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "GROUPED_PRODUCT", None)
        with pytest.raises(ValueError, match=r"MixtralForCausalLM cannot be followed.*a later one does"):
            plan(setting(where, options=options, dtype="bfloat16"))
    if GROUPED_PRODUCT is None:
        return
    found = plan(setting(where, options=options, dtype="bfloat16"))
    tokens, attention = BATCH * LENGTH, 2 * BATCH * LENGTH**2 * 2 * 64
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 4 * 64 + 2 * 3 * 64 * 96) + 64 * 96
    assert found.operations == pytest.approx(2 * (2 * tokens * weights + 3.5 * attention), rel=0.05)
    both = {**options, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    more = plan(setting(where, options=both, dtype="bfloat16"))
    assert more.trained_parameters - found.trained_parameters == 2 * 2 * 4 * (28 + 16)
    copies = 2 * 2 * 4 * 3 * 64 * 96
    assert more.adapter_activations - found.adapter_activations == copies
    # And what so few tokens cannot outweigh: the inputs of the products, for the gradient of the copies.
    assert copies <= more.memory["kept for backward"] - found.memory["kept for backward"] <= 2 * copies


def test_a_step_that_depends_on_the_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> float:
        return float(self.lm_head.weight.sum())

    model = tiny_llama()
    where = folder(model, tmp_path)
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="A step of LlamaForCausalLM cannot be followed without its weights"):
        plan(setting(where, options={"r": 8, "target_modules": ["q_proj"]}))
