"""LoRA files with diffusers' and kohya's names, loaded by diffusers itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import INNER_ATTENTION, randomize, relative_error, tiny_bert, tiny_text_encoder, tiny_unet
from isotune import HRAConfig, LoraXsConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.files.diffusion.fused import join
from isotune.files.diffusion.lora import export_lora_file
from isotune.files.diffusion.rotations import export_rotation
from isotune.methods.config import IsotuneConfig
from isotune.subspace.lowrank import Factored
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
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("make", "targets"), [(flux, ["to_q", "add_k_proj", "proj_mlp"]), (sd3, ["to_q", "add_k_proj"])]
)
def test_a_transformer(make: Any, targets: list[str], tmp_path: Path) -> None:
    model = get_peft_model(make(), PsoftConfig(r=4, target_modules=targets))
    randomize(model, std=0.2)
    export_lora_file(model, tmp_path / "lora.safetensors", "diffusers")
    found, expected = updates_by_diffusers(tmp_path / "lora.safetensors", make()), updates_of(model)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], update) < 1e-4 for name, update in expected.items())


IMAGE_QKV = ["to_q", "to_k", "to_v"]


def by_slices(file: Path, names: dict[str, list[str]], base: Any) -> dict[str, Tensor]:
    """Module -> change of its weight, as its rows of the change of kohya's layer."""
    stored, found = load_file(file), {}
    for stem, modules in names.items():
        up, down, alpha = (stored[f"lora_unet_{stem}.{key}"] for key in ("lora_up.weight", "lora_down.weight", "alpha"))
        change = up @ down * (alpha / len(down))
        rows = [base.get_submodule(module).weight.shape[0] for module in modules]
        assert sum(rows) == len(change)
        found |= {m: part for m, part in zip(modules, change.split(rows), strict=True) if part.any()}
    assert {f"lora_unet_{stem}" for stem in names} == {key.split(".")[0] for key in stored}
    return found


def test_kohyas_joined_layers_of_flux(tmp_path: Path) -> None:
    """As diffusers takes them apart, but for the single blocks, whose widths it has of the real model alone."""
    double = ["to_q", "to_v", "add_k_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2", "norm1.linear"]
    wide = rf"transformer_blocks.*({'|'.join(double)})|norm_out\.linear|proj_out"
    options: dict[str, Any] = {"r": 4, "target_modules": wide}
    model = get_peft_model(flux(), PsoftConfig(**options, rank_pattern={"to_v": 3}))
    randomize(model, std=0.2)
    expected = updates_of(model)
    assert export_lora_file(model, tmp_path / "lora.safetensors", "kohya").error == 0
    stored = load_file(tmp_path / "lora.safetensors")
    assert len(stored["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]) == 7
    state = diffusers.FluxPipeline.lora_state_dict(stored)
    # diffusers 0.42 gives the layers around the blocks their names without the prefix.
    state = {name if name.startswith("transformer.") else f"transformer.{name}": own for name, own in state.items()}
    base = flux()
    base.load_lora_adapter(state, prefix="transformer")
    base.fuse_lora()
    base.unload_lora()
    plain = flux()
    for name, update in expected.items():
        found = base.get_submodule(name).weight - plain.get_submodule(name).weight
        assert relative_error(found, update) < 1e-4, name
    assert torch.equal(base.get_submodule("transformer_blocks.0.attn.to_k").weight,
                       plain.get_submodule("transformer_blocks.0.attn.to_k").weight)  # fmt: skip


def test_kohyas_joined_layers_of_fluxs_single_blocks(tmp_path: Path) -> None:
    targets = r"single_transformer_blocks.*(to_q|to_v|proj_mlp|proj_out|norm\.linear)|x_embedder"
    model = get_peft_model(flux(), HRAConfig(r=4, target_modules=targets))
    randomize(model, std=0.2)
    export_lora_file(model, tmp_path / "lora.safetensors", "kohya")
    block = "single_transformer_blocks.0"
    linear = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    names = {"single_blocks_0_linear1": linear, "single_blocks_0_linear2": [f"{block}.proj_out"]}
    names |= {"single_blocks_0_modulation_lin": [f"{block}.norm.linear"], "img_in": ["x_embedder"]}
    found, expected = by_slices(tmp_path / "lora.safetensors", names, flux()), updates_of(model)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], update) < 1e-5 for name, update in expected.items())


def test_kohyas_joined_layers_of_sd3(tmp_path: Path) -> None:
    """The weights of the original layers, with the change of the file, become by diffusers' own conversion ours."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    model = get_peft_model(sd3(), PsoftConfig(r=4, target_modules="all-linear", exclude_modules=["add_k_proj"]))
    randomize(model, std=0.2)
    export_lora_file(model, tmp_path / "lora.safetensors", "kohya")
    stored = load_file(tmp_path / "lora.safetensors")
    assert len(stored["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"]) == 12
    changes = {stem: stored[f"{stem}.lora_up.weight"] @ stored[f"{stem}.lora_down.weight"]
               for stem in {key.split(".")[0] for key in stored}}  # fmt: skip
    found = convert(_original_sd3(sd3(), changes))
    expected = updates_of(model)
    linear = {name for name, module in sd3().named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in linear if "add_k_proj" not in name} == expected.keys()
    for name, weight in sd3().state_dict().items():
        module = name.removesuffix(".weight")
        if module in linear and name.endswith(".weight"):
            change = expected.get(module, torch.zeros_like(weight))
            assert (found[name] - change).abs().max() < 1e-5 * max(1.0, float(change.abs().max())), name


def _original_sd3(base: Any, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint in the original layout that is zero but for the changes."""
    width, blocks = base.config.num_attention_heads * base.config.attention_head_dim, len(base.transformer_blocks)
    config = base.config
    time, words, pooled = 256, config.joint_attention_dim, config.pooled_projection_dim
    layers = {"t_embedder.mlp.0": (width, time), "t_embedder.mlp.2": (width, width)}
    layers |= {"y_embedder.mlp.0": (width, pooled), "y_embedder.mlp.2": (width, width)}
    layers |= {"context_embedder": (width, words), "final_layer.adaLN_modulation.1": (2 * width, width)}
    layers["final_layer.linear"] = (config.patch_size**2 * config.out_channels, width)
    for i in range(blocks):
        for side in ("x_block", "context_block"):
            last = side == "context_block" and i == blocks - 1
            sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
            sizes |= {"mlp.fc2": (width, 4 * width), "adaLN_modulation.1": ((2 if last else 6) * width, width)}
            layers |= {f"joint_blocks.{i}.{side}.{layer}": shape for layer, shape in sizes.items()}
    state = dict.fromkeys(["pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias"], torch.zeros(1, 1))
    for layer, (rows, columns) in layers.items():
        weight = changes.pop(f"lora_unet_{layer.replace('.', '_')}", torch.zeros(rows, columns))
        assert weight.shape == (rows, columns), layer
        state |= {f"{layer}.weight": weight, f"{layer}.bias": torch.zeros(rows)}
    assert not changes
    return state


def test_what_kohya_has_no_layer_for(tmp_path: Path) -> None:
    named = get_peft_model(sd3(), PsoftConfig(r=2, target_modules=["to_q", "pos_embed.proj"]))
    with pytest.raises(ValueError, match=r"no separate layer for 'pos_embed\.proj'.*--names diffusers"):
        export_lora_file(named, tmp_path / "lora.safetensors", "kohya")
    rotation = get_peft_model(flux(), OFTConfig(oft_block_size=8, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"no separate layer for 'transformer_blocks\.0\.attn\.to_q'"):
        export_rotation(rotation, tmp_path / "oft.safetensors", "kohya")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_1", "text_encoder_2"])
@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_a_text_encoder(names: Any, component: Any, tmp_path: Path) -> None:
    encoder = functools.partial(tiny_text_encoder, projected=component == "text_encoder_2")
    model = get_peft_model(encoder(), PsoftConfig(r=4, target_modules=["q_proj", "out_proj", "fc1"]))
    randomize(model, std=0.2)
    export_lora_file(model, tmp_path / "lora.safetensors", names, component=component)
    stored = load_file(tmp_path / "lora.safetensors")
    start = {"text_encoder": "lora_te_", "text_encoder_1": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
    where = component.removesuffix("_1")
    assert all(
        key.startswith(f"{where}.text_model." if names == "diffusers" else f"{start}text_model_") for key in stored
    )
    pipeline: Any = diffusers.StableDiffusionXLPipeline
    state, alphas = pipeline.lora_state_dict(stored)
    base, plain = encoder(), encoder()
    pipeline.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=base, prefix=where)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        found, expected, before = (m(input_ids=ids).last_hidden_state for m in (base, model, plain))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(before, expected) > 1e-2
    for wrong in (None, "unet"):
        with pytest.raises(ValueError, match=r"component=.*text_encoder_2 \(--component\)"):
            export_lora_file(model, tmp_path / "other.safetensors", names, component=wrong)  # type: ignore[arg-type]


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


def test_the_command_on_a_text_encoder(tmp_path: Path) -> None:
    tiny_text_encoder().save_pretrained(tmp_path / "base")
    base = type(tiny_text_encoder()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PsoftConfig(r=4, target_modules=["q_proj"]))
    randomize(model, std=0.2)
    model.save_pretrained(tmp_path / "ours")
    arguments = ["export", str(tmp_path / "ours"), "-o", str(tmp_path / "lora.safetensors"), "--to", "lora"]
    arguments += ["--component", "text_encoder_2"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2  # an ordinary folder knows no component
    done = CliRunner().invoke(cli.app, [*arguments, "--names", "kohya"])
    assert done.exit_code == 0, done.output
    up = load_file(tmp_path / "lora.safetensors")[
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight"
    ]
    assert up.shape == (32, 4)


def test_what_has_no_form(tmp_path: Path) -> None:
    bert = get_peft_model(tiny_bert(), PsoftConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="diffusers models"):
        export_lora_file(bert, tmp_path / "a.safetensors", "kohya")
    biased = get_peft_model(unet(), HRAConfig(r=2, target_modules=["to_q"], bias="isotune_only"))
    with pytest.raises(ValueError, match="modules or biases"):
        export_lora_file(biased, tmp_path / "a.safetensors", "kohya")


def test_a_joined_layer_of_which_a_packed_part_is_not_adapted() -> None:
    """Its rows are those of the layer, whatever form its weight is kept in."""
    base = flux()
    attention = base.transformer_blocks[0].attn
    rows = attention.to_k.out_features
    attention.to_k.weight = nn.Parameter(torch.zeros(30, 1))
    query = Factored(torch.ones(rows, 2), torch.ones(2, rows), 0.0, 1.0)
    ((up, _),) = join({"transformer_blocks.0.attn.to_q": query}, base).values()
    assert up.shape == (3 * rows, 2)
