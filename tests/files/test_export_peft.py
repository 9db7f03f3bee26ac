"""Rotations written as PEFT's own OFT and BOFT: PEFT alone computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import isotune_cli as cli
from elsewhere import printed_elsewhere
from helpers import layers_of, randomize, relative_error, tiny_bert, tiny_gpt2, tiny_llama
from isotune import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.files.export_peft import export_peft
from isotune.files.peft_import import import_peft
from isotune.methods.config import IsotuneConfig

TOKENS = torch.arange(4, 24).reshape(2, 10)
TARGETS = ["q_proj", "down_proj"]
CASES: dict[str, IsotuneConfig] = {
    "exact": OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "series": OFTConfig(oft_block_size=8, use_cayley_neumann=True, num_cayley_neumann_terms=3, target_modules=TARGETS),
    "longer": OFTConfig(oft_block_size=8, use_cayley_neumann=True, num_cayley_neumann_terms=5, target_modules=TARGETS),
    "blocks": OFTConfig(r=4, target_modules=TARGETS),
    "shared": OFTConfig(oft_block_size=8, block_share=True, target_modules=TARGETS),
    "coft": OFTConfig(oft_block_size=8, coft=True, eps=2.0, target_modules=TARGETS),
    "boft": BOFTConfig(boft_block_size=8, target_modules=TARGETS, bias="isotune_only"),
    "scaled": OFTConfig(oft_block_size=8, scaled_generator=True, target_modules=TARGETS),
    "scaled-boft": BOFTConfig(boft_block_size=8, scaled_generator=True, target_modules=TARGETS),
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def trained(config: IsotuneConfig) -> Any:
    model = get_peft_model(tiny_llama(), config)
    randomize(model, std=0.1)
    assert relative_error(logits(model), logits(tiny_llama())) > 1e-3
    return model


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    model = trained(CASES[case])
    assert export_peft(model, tmp_path / "theirs") == 4
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    assert type(loaded.peft_config["default"]) is getattr(peft, type(CASES[case]).__name__)
    assert relative_error(logits(loaded), logits(model)) < 1e-5
    # The keys are those that PEFT itself writes.
    loaded.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "again"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in again.items()}
    assert relative_error(logits(import_peft(tmp_path / "theirs", tiny_llama())), logits(model)) < 1e-5


def test_a_rotation_taken_in_part_is_written_so(tmp_path: Path) -> None:
    model = trained(CASES["exact"])
    whole = logits(model)
    for layer in layers_of(model):
        layer.set_scale("default", 0.5)
    assert relative_error(logits(model), whole) > 1e-3
    export_peft(model, tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    assert relative_error(logits(loaded), logits(model)) < 1e-5


@pytest.mark.slow
def test_the_command_on_a_classifier_and_a_process_without_isotune(tmp_path: Path) -> None:
    tiny_bert(num_labels=3).save_pretrained(tmp_path / "base")
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, OFTConfig(oft_block_size=8, target_modules=["query"], task_type="SEQ_CLS"))
    randomize(model, std=0.2)
    model.save_pretrained(tmp_path / "ours")
    ids = torch.arange(4, 12)[None]
    save_file({"logits": model.eval()(input_ids=ids).logits.detach()}, tmp_path / "expected.safetensors")
    arguments = ["export", str(tmp_path / "ours"), "--to", "peft", "-o", str(tmp_path / "theirs")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    script = """
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
with torch.no_grad():
    found = PeftModel.from_pretrained(base, "theirs").eval()(input_ids=torch.arange(4, 12)[None]).logits
print(float((found - load_file("expected.safetensors")["logits"]).abs().max()))
"""
    (error,) = printed_elsewhere(script, tmp_path)
    assert float(error) < 1e-5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PsoftConfig(r=2, target_modules=TARGETS), "rotate inputs"),
        (HRAConfig(r=2, target_modules=TARGETS), "rotate inputs"),
        (OFTConfig(oft_block_size=8, side="output", target_modules=TARGETS), "OFTOperator on the outputs"),
        (BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=TARGETS), "butterfly of 2 factors"),
        (OFTConfig(oft_block_size=8, block_size_pattern={"q_proj": 4}, target_modules=TARGETS), "blocks of 4, 8, but"),
    ],
)
def test_refusals(config: IsotuneConfig, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{said}.*--to merged"):
        export_peft(get_peft_model(tiny_llama(), config), tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_peft_does_not_rotate_alike(tmp_path: Path) -> None:
    model = get_peft_model(tiny_gpt2(), OFTConfig(oft_block_size=8, target_modules=["c_attn"]))
    with pytest.raises(ValueError, match=r"is a Conv1D; .*only on linear layers"):
        export_peft(model, tmp_path / "theirs")


@pytest.mark.parametrize("shared", [True, False])
def test_shared_blocks_beside_a_layer_of_one_block(shared: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    config = OFTConfig(target_modules=["0", "2"], oft_block_size=8, block_share=shared)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomize(model)
    export_peft(model, tmp_path / "peft")
    x = torch.randn(5, 8)
    assert relative_error(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(x), model(x)) < 1e-5
