"""LoRA files with diffusers' and kohya's names, loaded by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import INNER_ATTENTION, randomize, relative_error, tiny_bert, tiny_unet
from isotune import HRAConfig, LoraXsConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.files.diffusion.lora import export_lora_file
from isotune.methods.config import IsotuneConfig
from isotune.tuner.state import adapted_layers

diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in", "linear_1"]


def unet(sdxl: bool = False) -> Any:
    more: dict[str, Any] = {}
    if sdxl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32,
        }
    return tiny_unet(**INNER_ATTENTION, **more)


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def sd3() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    ).eval()  # fmt: skip


def updates_of(model: nn.Module) -> dict[str, Tensor]:
    """Module -> change of its weight by isotune's adapter."""
    return {name: layer.get_delta_weight("default") for name, layer in adapted_layers(model, "default")}


def updates_by_diffusers(file: Path, base: Any) -> dict[str, Tensor]:
    """Module -> change of its weight after diffusers' own loading and fusing."""
    pipeline: Any = diffusers.StableDiffusionPipeline
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    if isinstance(base, diffusers.UNet2DConditionModel):
        state, alphas = pipeline.lora_state_dict(load_file(file), unet_config=base.config)
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=base)
    else:
        base.load_lora_adapter(load_file(file), prefix="transformer")
    base.fuse_lora()
    base.unload_lora()
    after = dict(base.named_parameters())
    return {
        name.removesuffix(".weight"): after[name].detach() - weight
        for name, weight in before.items()
        if not torch.equal(after[name], weight)
    }


CONFIGS: dict[str, IsotuneConfig] = {
    "psoft": PsoftConfig(r=6, target_modules=TARGETS),
    "lora_xs": LoraXsConfig(r=4, target_modules=TARGETS),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("method", CONFIGS)
def test_exact_on_a_unet(method: str, sdxl: bool, names: Any, tmp_path: Path) -> None:
    model = get_peft_model(unet(sdxl), CONFIGS[method])
    randomize(model, std=0.2)
    expected = updates_of(model)
    assert {update.ndim for update in expected.values()} == {2, 4}
    report = export_lora_file(model, tmp_path / "lora.safetensors", names)
    assert report.error == 0
    if names == "kohya":
        keys = load_file(tmp_path / "lora.safetensors")
        assert any("input_blocks" in key for key in keys) == sdxl
        assert {key.split(".", 1)[1] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}
    found = updates_by_diffusers(tmp_path / "lora.safetensors", unet(sdxl))
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert relative_error(found[name], update) < 1e-4, name  # fusing rounds to the weight's float32


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_a_rotation_by_its_best_rank(names: Any, tmp_path: Path) -> None:
    model = get_peft_model(unet(), OFTConfig(oft_block_size=8, target_modules=["to_q", "conv1"]))
    randomize(model, std=0.2)
    with pytest.raises(ValueError, match="full rank"):
        export_lora_file(model, tmp_path / "lora.safetensors", names)
    assert not (tmp_path / "lora.safetensors").exists()
    report = export_lora_file(model, tmp_path / "lora.safetensors", names, energy=0.9)
    assert len({layer.rank for layer in report.layers}) > 1
    assert 0.05 < report.error <= 0.1**0.5
    found, expected = updates_by_diffusers(tmp_path / "lora.safetensors", unet()), updates_of(model)
    missing = sum(float((found[name] - update).square().sum()) for name, update in expected.items()) ** 0.5
    assert missing / sum(float(u.square().sum()) for u in expected.values()) ** 0.5 == pytest.approx(report.error, 1e-3)


@pytest.mark.parametrize("make", [flux, sd3])
def test_a_transformer(make: Any, tmp_path: Path) -> None:
    model = get_peft_model(make(), PsoftConfig(r=4, target_modules=["to_q", "add_k_proj", "proj_mlp"]))
    randomize(model, std=0.2)
    with pytest.raises(ValueError, match=r"join several layers into one.*--names diffusers"):
        export_lora_file(model, tmp_path / "lora.safetensors", "kohya")
    export_lora_file(model, tmp_path / "lora.safetensors", "diffusers")
    found, expected = updates_by_diffusers(tmp_path / "lora.safetensors", make()), updates_of(model)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], update) < 1e-4 for name, update in expected.items())


def test_the_command(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "base")
    model = get_peft_model(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base"), CONFIGS["psoft"])
    randomize(model, std=0.2)
    model.save_pretrained(tmp_path / "ours")
    arguments = ["export", str(tmp_path / "ours"), "--to", "lora", "--names", "kohya", "--base", str(tmp_path / "base")]
    arguments += ["-o", str(tmp_path / "lora.safetensors")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "exact" in done.output
    found, expected = updates_by_diffusers(tmp_path / "lora.safetensors", unet()), updates_of(model)
    assert all(relative_error(found[name], update) < 1e-4 for name, update in expected.items())
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "must be a new file" in done.output
    assert CliRunner().invoke(cli.app, [*arguments, "--uniform-rank"]).exit_code == 2


def test_what_has_no_form(tmp_path: Path) -> None:
    bert = get_peft_model(tiny_bert(), PsoftConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="models of diffusers"):
        export_lora_file(bert, tmp_path / "a.safetensors", "kohya")
    biased = get_peft_model(unet(), HRAConfig(r=2, target_modules=["to_q"], bias="isotune_only"))
    with pytest.raises(ValueError, match="modules or biases"):
        export_lora_file(biased, tmp_path / "a.safetensors", "kohya")
