"""An adapter taken out of a checkpoint: itself if one made it, and as near as its report says if not."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import Stack, layers_of, randomize, relative_error, some_tokens, tiny_bert, tiny_gpt2, tiny_opt
from isotune import HRAConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.files import checkpoint
from isotune.files.export_lora import export_lora
from isotune.files.export_merged import export_merged
from isotune.methods import METHODS
from isotune.tools import extraction
from isotune.tools.extraction import RESIDUAL, extract
from isotune.tools.fitting import fit
from isotune.tuner.layer import Layer

TARGETS = ["first", "second", "third"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "oft-scaled": ("oft", {"oft_block_size": 8, "scaled_generator": True}),
    "psoft-scaled": (
        "psoft",
        {"r": 8, "scaled_generator": True, "psoft_mag_a": False, "psoft_mag_b": False},
    ),
    "oft": ("oft", {"oft_block_size": 8}),
    "oft-shared-output": ("oft", {"oft_block_size": 8, "block_share": True, "side": "output"}),
    "psoft": ("psoft", {"r": 8}),
    "psoft-strict": ("psoft", {"r": 12, "psoft_mag_a": False, "psoft_mag_b": False, "basis": "embedded"}),
    "psoft-alpha": ("psoft", {"r": 6, "psoft_mag_b": False, "rank_pattern": {"second": 4}}),
    "hra": ("hra", {"r": 4}),
    "hra-output": ("hra", {"r": 6, "side": "output"}),
}


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def output(model: nn.Module, x: Tensor | None = None) -> Tensor:
    x = torch.linspace(-2, 2, 5 * 24).reshape(5, 24) if x is None else x
    with torch.no_grad():
        result: Any = model.eval()(x)
    found: Tensor = result if isinstance(result, Tensor) else result.logits
    return found


@pytest.mark.parametrize("std", [0.01, 0.2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_what_an_adapter_made_gives_the_adapter_back(tmp_path: Path, case: str, std: float) -> None:
    method, options = CASES[case]
    config = METHODS[method](**{"target_modules": TARGETS, **options})
    trained = get_peft_model(stack(), config)
    randomize(trained, std=std)
    expected = output(trained)
    tuned = copy.deepcopy(trained).merge_and_unload()
    base = stack()
    report = extract(base, tuned, config, tmp_path / "new")
    assert report.error < 1e-4
    assert not report.outside
    assert torch.equal(output(base), output(stack()))
    assert all(parameter.requires_grad for parameter in base.parameters())
    found = PeftModel.from_pretrained(stack(), str(tmp_path / "new"))
    assert found.peft_config["default"].to_dict().get("r") == config.to_dict().get("r")
    assert relative_error(output(found) - output(base), expected - output(base)) < 1e-4


def tune(model: nn.Module, x: Tensor, steps: int = 4) -> nn.Module:
    """A few steps of full fine-tuning towards another output."""
    torch.manual_seed(3)
    wanted = torch.randn_like(output(model, x))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        result: Any = model(x)
        (getattr(result, "logits", result) - wanted).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("case", ["oft", "psoft", "hra"])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
@pytest.mark.slow
def test_the_error_said_is_that_of_what_is_loaded(tmp_path: Path, case: str, family: str) -> None:
    make = {"opt": tiny_opt, "gpt2": tiny_gpt2}[family]
    make(layers=1).save_pretrained(str(tmp_path / "base"))
    tune(make(layers=1), some_tokens()).save_pretrained(str(tmp_path / "tuned"))
    options = {"oft": ["oft_block_size=8"], "psoft": ["r=8"], "hra": ["--r", "4"]}[case]
    options += [{"opt": "target_modules=[q_proj, fc2]", "gpt2": "target_modules=[c_attn]"}[family]]
    names = [str(tmp_path / name) for name in ("base", "tuned", "new")]
    asked = [
        "extract",
        *names[:2],
        *options,
        "--as",
        case,
        "-o",
        names[2],
        "--residual",
        "lora",
        "--residual-rank",
        "3",
    ]
    done = CliRunner().invoke(cli.app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert json.loads((tmp_path / "new/isotune_extraction.json").read_text()) == {
        k: v for k, v in said.items() if k != "wrote"
    }
    base, tuned = type(make()).from_pretrained(names[0]), type(make()).from_pretrained(names[1])
    adapted = PeftModel.from_pretrained(base, names[2])
    lora = load_file(tmp_path / "new" / RESIDUAL / "adapter_model.safetensors")
    assert {layer.key for layer in layers_of(adapted)} == said["layers"].keys()
    assert said["layers"]
    for layer in layers_of(adapted):
        weight = layer.unmerged_matrix()
        change = layer.host.seen(tuned.get_submodule(layer.key).weight.detach()) - weight
        left = change - layer.host.seen(layer.get_delta_weight("default"))
        up, down = (lora[f"base_model.model.{layer.key}.lora_{name}.weight"] for name in "BA")
        assert len(down) == 3
        row = said["layers"][layer.key]
        for name, matrix in (("weight", weight), ("change", change), ("left", left), ("missing", left - up @ down)):
            assert row[name] == pytest.approx(float(matrix.norm()), rel=1e-4)
        assert row["missing"] < row["left"] < row["change"]
    outside = {name for name, p in tuned.named_parameters() if name.removesuffix(".weight") not in said["layers"]}
    assert said["outside"].keys() == outside
    assert not any(one["kept"] for one in said["outside"].values())


@pytest.mark.slow
def test_no_search_from_elsewhere_comes_nearer() -> None:
    torch.manual_seed(1)
    base, tuned = stack(), tune(stack(), torch.randn(8, 24))
    for method, options in (("psoft", {"r": 6}), ("hra", {"r": 4})):
        model = get_peft_model(copy.deepcopy(base), METHODS[method](target_modules=["second"], **options))
        (layer,) = layers_of(model)
        weight, target = layer.unmerged_matrix(), tuned.second.weight.detach()
        adapter = layer.adapter("default")
        adapter.load_state_dict(fit(adapter, weight, target))
        least = float((layer.get_delta_weight("default") - (target - weight)).norm())
        assert least < 0.995 * float((target - weight).norm())
        for seed in range(3):
            randomize(model, std=0.05, seed=seed)
            search = torch.optim.Adam(adapter.parameters(), lr=3e-3)
            for _ in range(60):
                search.zero_grad()
                left = layer.fold(["default"], weight) - target
                left.square().sum().backward()
                search.step()
            assert float(left.detach().norm()) > 0.998 * least


@pytest.mark.slow
def test_a_residual_goes_with_the_adapter_in_each_of_the_ways_that_the_guide_names(tmp_path: Path) -> None:
    make, tokens = functools.partial(tiny_opt, layers=1), some_tokens()
    make().save_pretrained(str(tmp_path / "base"))
    tuned = make()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                parameter.add_(0.02 * torch.randn_like(parameter))
    load = type(tuned).from_pretrained
    config = PsoftConfig(r=8, target_modules=["q_proj", "v_proj"])
    report = extract(load(tmp_path / "base"), tuned, config, tmp_path / "new", residual="lora", residual_rank=64)
    assert report.error < 1e-3
    expected, base = output(tuned, tokens), output(load(tmp_path / "base"), tokens)
    # Merged first, and the LoRA on the result.
    export_merged(tmp_path / "new", tmp_path / "merged", base=str(tmp_path / "base"))
    found = PeftModel.from_pretrained(load(tmp_path / "merged"), str(tmp_path / "new" / RESIDUAL))
    assert relative_error(output(found, tokens) - base, expected - base) < 1e-3
    # Both as one LoRA.
    export_lora(tmp_path / "new", tmp_path / "lora", base=str(tmp_path / "base"))
    both = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "lora"), "rotation")
    both.load_adapter(str(tmp_path / "new" / RESIDUAL), "residual")
    both.add_weighted_adapter(["rotation", "residual"], [1.0, 1.0], "both", combination_type="cat")
    both.set_adapter("both")
    assert relative_error(output(both, tokens) - base, expected - base) < 1e-3
    # Both at once, the LoRA around the adapter.
    inner = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "new"))
    outer = PeftModel.from_pretrained(inner.base_model.model, str(tmp_path / "new" / RESIDUAL))
    assert isinstance(outer.peft_config["default"], LoraConfig)
    assert relative_error(output(outer, tokens) - base, expected - base) < 1e-3


def test_heads_norms_and_biases_are_kept_if_asked(tmp_path: Path) -> None:
    make, tokens = tiny_bert, some_tokens()
    tuned = tune(make(), tokens)
    config = OFTConfig(
        oft_block_size=8, target_modules=["query", "value"], modules_to_save=["classifier", "LayerNorm"], bias="all"
    )
    base = make()
    report = extract(base, tuned, config, tmp_path / "new")
    kept = {one.name for one in report.outside if one.kept}
    assert {"classifier.weight", "classifier.bias", "bert.embeddings.LayerNorm.weight"} <= kept
    assert "bert.encoder.layer.0.output.dense.bias" in kept
    assert "bert.encoder.layer.0.output.dense.weight" in {one.name for one in report.outside} - kept
    assert torch.equal(output(base, tokens), output(make(), tokens))
    found = PeftModel.from_pretrained(make(), str(tmp_path / "new")).get_base_model()
    for name, parameter in tuned.named_parameters():
        if name in kept:
            module, _, last = name.rpartition(".")
            own: Any = found.get_submodule(module)
            for part in ("base_layer", "modules_to_save"):
                own = getattr(own, part, own)
            own = own["default"] if isinstance(own, nn.ModuleDict) else own
            assert torch.equal(getattr(own, last), parameter), name


def test_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shards, by names that lack the head's prefix, and without loading the model."""
    make, tokens = tiny_bert, some_tokens()
    tuned = tune(make(), tokens)
    tuned.bert.save_pretrained(str(tmp_path / "tuned"), max_shard_size="40KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    monkeypatch.setattr(checkpoint, "load_base", lambda name: pytest.fail("the model was loaded"))
    config = OFTConfig(oft_block_size=8, target_modules=["query", "value"])
    report = extract(make(), str(tmp_path / "tuned"), config)
    assert report.to_dict()["layers"] == extract(make(), tuned, config).to_dict()["layers"]
    assert {one.name for one in report.outside if one.change is None} == {"classifier.weight", "classifier.bias"}


def test_a_tied_head_has_its_weight_from_the_whole_model(tmp_path: Path) -> None:
    """Its file holds the embedding only."""
    tuned = tune(tiny_opt(), some_tokens())
    tuned.save_pretrained(str(tmp_path / "tuned"))
    base, config = tiny_opt(), OFTConfig(oft_block_size=8, target_modules=["lm_head"])
    report = extract(base, str(tmp_path / "tuned"), config)
    change = tuned.lm_head.weight - base.lm_head.weight
    assert report.whole.change == pytest.approx(float(change.detach().norm()), rel=1e-5)


def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = stack(), tune(stack(), torch.randn(8, 24))
    config = OFTConfig(oft_block_size=8, target_modules=TARGETS)
    expected = output(base)
    for module, name in ((extraction, "_extracted"), (extraction, "write_lora")):
        run, calls = getattr(module, name), []

        def stopped(*given: Any, run: Any = run, calls: list[None] = calls) -> Any:
            calls.append(None)
            if len(calls) == (2 if run.__name__ == "_extracted" else 1):
                raise KeyboardInterrupt
            return run(*given)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                extract(base, tuned, config, tmp_path / "new", residual="lora", residual_rank=2)
        assert not list(tmp_path.iterdir())
        assert not layers_of(base)
        assert torch.equal(output(base), expected)
    extract(base, tuned, config, tmp_path / "new", residual="lora", residual_rank=2)
    assert (tmp_path / "new" / RESIDUAL).is_dir()


def test_a_reflection_and_half_a_turn_are_reached_as_near_as_can_be() -> None:
    base = nn.Sequential(nn.Linear(6, 6, bias=False))
    for signs, nearest in (([-1, 1, 1, 1, 1, 1], None), ([-1, -1, 1, 1, 1, 1], 2e-4)):
        tuned = copy.deepcopy(base)
        tuned[0].weight.data *= torch.tensor(signs)
        report = extract(base, tuned, OFTConfig(oft_block_size=6, target_modules=["0"]))
        if nearest is not None:
            assert report.error < nearest
            continue
        # With determinant +1, the least singular value counts against: ‖W' − W Rᵀ‖² = 4 σ² of W'ᵀW.
        values = torch.linalg.svdvals(tuned[0].weight.detach().double().T @ base[0].weight.detach().double())
        norms = 2 * base[0].weight.detach().double().square().sum()
        expected = math.sqrt(float(norms - 2 * (values.sum() - 2 * values[-1])))
        assert report.layers[0].left == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (METHODS["goft"](target_modules=["first"]), "A GOFTConfig cannot be extracted; oft, psoft, hra can be"),
        (OFTConfig(oft_block_size=8, coft=True), "coft=True cannot be extracted"),
        (PsoftConfig(r=8, use_cayley_neumann=True), "use_cayley_neumann=True cannot"),
        (PsoftConfig(r=8, psoft_orth=False, psoft_mag_a=False), "psoft_orth=False cannot"),
        (PsoftConfig(r=8, ab_svd_init="pissa_init"), "ab_svd_init='pissa_init' cannot .*leave it at 'psoft_init'"),
        (HRAConfig(r=4, apply_GS=True, init_weights=False), "apply_GS=True cannot"),
        (
            OFTConfig(oft_block_size=8, target_modules=["first"], modules_to_save=["head"]),
            "modules_to_save names 'head'",
        ),
        (PsoftConfig(r=99, target_modules=["first"]), "r=99 is too large"),
    ],
)
def test_what_has_no_nearest_adapter_is_refused(tmp_path: Path, config: Any, said: str) -> None:
    base = stack()
    with pytest.raises(ValueError, match=said):
        extract(base, stack(), config, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    assert not layers_of(base)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_models_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    config = OFTConfig(oft_block_size=8, target_modules=TARGETS)
    for other, said in (
        (Stack(32), r"'first.weight' has shape \(40, 24\) in the base model, and \(40, 32\)"),
        (nn.Linear(3, 3), "has no tensor 'first.weight'"),
    ):
        with pytest.raises(ValueError, match=said):
            extract(stack(), other, config, tmp_path / "new")
    make = tiny_opt
    make().save_pretrained(str(tmp_path / "base"))
    folder = tmp_path / "tuned"
    make().save_pretrained(str(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    run, twice = CliRunner().invoke, [str(tmp_path / "base")] * 2
    for arguments, said in (
        ([str(tmp_path / "base"), str(folder)], "damaged or not complete"),
        ([str(tmp_path / "base"), str(tmp_path / "absent")], "There is no folder"),
        ([*twice, "--as", "boft"], "--as='boft' is not one of"),
        ([*twice, "--rank", "8"], "--rank is for psoft and hra"),
        ([*twice, "--residual", "x"], "--residual='x' is not one of"),
        ([*twice, "--residual-rank", "4"], "is for --residual lora"),
        ([*twice, "--residual", "lora", "--residual-rank", "0"], "residual_rank=0"),
        ([*twice, "residual=lora"], "unexpected keyword argument 'residual'"),
        ([*twice, "--as", "psoft", "--rank", "8", "r=4"], "--rank 8 and r=4 are both given"),
    ):
        size = [] if "--rank" in arguments else ["oft_block_size=8"]
        done = run(cli.app, ["extract", *arguments, *size, "-o", str(tmp_path / "new")])
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert said in done.stderr
        assert not (tmp_path / "new").exists()


def test_the_table_says_what_each_part_holds_and_what_is_left_out(tmp_path: Path) -> None:
    make = tiny_opt
    make().save_pretrained(str(tmp_path / "base"))
    tune(make(), some_tokens()).save_pretrained(str(tmp_path / "tuned"))
    arguments = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "oft_block_size=8", "--residual", "lora"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["layer", "change", "OFT", "residual", "left"]
    whole = next(row for row in rows if row.startswith("all ")).split()
    change, rotation, residual, left = (float(word.rstrip("%")) for word in whole[1:])
    assert rotation + residual + left**2 / 100 == pytest.approx(100, abs=0.2)
    assert change > 0
    assert any("changed tensors are left out (modules_to_save, bias keep them)" in row for row in rows)
    assert any(row.startswith("  model.decoder.embed_tokens.weight  6,144 numbers, changed by ") for row in rows)
    assert any(row.startswith("  model.decoder.layers.*.fc1.bias  2 tensors, 224 numbers, changed by ") for row in rows)
    same = CliRunner().invoke(cli.app, ["extract", str(tmp_path / "base"), str(tmp_path / "base"), "oft_block_size=8"])
    assert same.stdout.splitlines()[-2].split() == ["all", "0.00%", "0.0%", "0.0%"]


def test_models_from_which_nothing_can_be_taken_are_refused() -> None:
    config = OFTConfig(oft_block_size=8, target_modules=TARGETS)
    base, tuned = stack(), stack()
    with pytest.raises(ValueError, match="base and tuned are one model"):
        extract(base, base, config)
    with pytest.raises(ValueError, match="given as base has adapters"):
        extract(get_peft_model(stack(), config), tuned, config)
    with torch.no_grad():
        tuned.first.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'first' holds NaN or infinity in the fine-tuned model"):
        extract(base, tuned, config)
    assert not any(isinstance(module, Layer) for module in base.modules())
