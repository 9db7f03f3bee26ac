"""Rotations written as kohya's and LyCORIS' files: what comes back from them is the same function."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_lycoris import DATA, Base, updates_of
from torch import nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import INNER_ATTENTION, layers_of, randomize, relative_error, tiny_text_encoder, tiny_unet
from isotune import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.files.diffusion.rotations import export_rotation
from isotune.files.diffusion.single import import_single
from isotune.methods.config import IsotuneConfig
from isotune.tuner.state import adapted_layers

diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "proj_in", "conv1"]
SERIES = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}


def unet() -> Any:
    return tiny_unet(**INNER_ATTENTION)


def trained(base: nn.Module, config: IsotuneConfig) -> nn.Module:
    model = get_peft_model(base, config)
    randomize(model, std=0.2)
    return model


def check_same(model: nn.Module, again: nn.Module) -> None:
    expected, found = updates_of(model), updates_of(again)
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert update.norm() > 0.1
        assert relative_error(found[name], update) < 1e-5, name


KOHYA: dict[str, tuple[IsotuneConfig, set[str]]] = {
    "series": (OFTConfig(oft_block_size=8, **SERIES, target_modules=TARGETS), {"oft_R.weight"}),
    "shared": (OFTConfig(oft_block_size=8, **SERIES, block_share=True, target_modules=TARGETS), {"oft_R.weight"}),
    "exact": (OFTConfig(oft_block_size=8, target_modules=TARGETS), {"boft_R", "boft_s"}),
    "coft": (OFTConfig(oft_block_size=8, coft=True, eps=2.0, target_modules=TARGETS), {"boft_R", "boft_s"}),
    "boft": (BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=TARGETS), {"boft_R", "boft_s"}),
}


@pytest.mark.parametrize("case", KOHYA)
def test_kohya(case: str, tmp_path: Path) -> None:
    config, keys = KOHYA[case]
    model = trained(unet(), config)
    assert export_rotation(model, tmp_path / "a.safetensors", "kohya") == len(updates_of(model))
    stored = load_file(tmp_path / "a.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert {key.split(".", 1)[1] for key in stored} == keys
    assert all(key.startswith("lora_unet_") for key in stored)
    check_same(model, import_single(tmp_path / "a.safetensors", unet()))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_onetrainer(scaled: bool, share: bool, tmp_path: Path) -> None:
    """Its weights are the trained ones, and the flag says that they are divided by 2 √(b − 1) where they are used."""
    config = OFTConfig(oft_block_size=8, **SERIES, scaled_generator=scaled, block_share=share, target_modules=TARGETS)
    model = trained(unet(), config)
    assert export_rotation(model, tmp_path / "a.safetensors", "onetrainer") == len(updates_of(model))
    stored = load_file(tmp_path / "a.safetensors")
    for name, layer in adapted_layers(model, "default"):
        stem = "lora_unet_" + name.replace(".", "_")  # diffusers' names
        own = layer.adapter("default").generator.detach().abs()
        torch.testing.assert_close(stored.pop(f"{stem}.oft_R.weight").abs(), own)
        flag = stored.pop(f"{stem}.oft_R.scaled_oft", None)
        assert (flag is not None) == scaled
        assert flag is None or (flag.dtype == torch.bool and bool(flag))
    assert not stored
    again = import_single(tmp_path / "a.safetensors", unet())
    check_same(model, again)
    assert again.peft_config["default"].scaled_generator == scaled
    # kohya's reader knows no flag, so its files hold what is used.
    export_rotation(model, tmp_path / "kohya.safetensors", "kohya")
    assert not any("scaled" in key for key in load_file(tmp_path / "kohya.safetensors"))
    check_same(model, import_single(tmp_path / "kohya.safetensors", unet()))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OFTConfig(oft_block_size=8, target_modules=TARGETS), "by the exact transform; OneTrainer's files"),
        (BOFTConfig(boft_block_size=8, target_modules=TARGETS), "is a BOFTOperator by the exact transform"),
        (OFTConfig(oft_block_size=8, **SERIES, side="output", target_modules=TARGETS), "on the inputs"),
    ],
    ids=["exact", "boft", "outputs"],
)
def test_what_onetrainer_does_not_compute_is_refused(config: IsotuneConfig, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        export_rotation(trained(unet(), config), tmp_path / "a.safetensors", "onetrainer")
    assert not (tmp_path / "a.safetensors").exists()


LYCORIS: dict[str, IsotuneConfig] = {
    "oft": OFTConfig(oft_block_size=4, side="output", target_modules=TARGETS),
    "shared": OFTConfig(oft_block_size=4, block_share=True, side="output", target_modules=TARGETS),
    "gain": BOFTConfig(boft_block_size=4, side="output", target_modules=TARGETS),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris(case: str, tmp_path: Path) -> None:
    model = trained(unet(), LYCORIS[case])
    export_rotation(model, tmp_path / "a.safetensors", "lycoris")
    stored = load_file(tmp_path / "a.safetensors")
    # No reader's bound acts: alpha · out in LyCORIS and kohya, alpha in ComfyUI.
    for key, blocks in stored.items():
        if key.endswith("oft_blocks"):
            assert (blocks - blocks.mT).norm() < stored[key.replace("oft_blocks", "alpha")]
    check_same(model, import_single(tmp_path / "a.safetensors", unet()))


@pytest.mark.parametrize("form", ["kohya", "lycoris"])
@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(oft_block_size=4, coft=True, eps=2.0, target_modules=TARGETS),
        BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    ],
    ids=["coft", "boft"],
)
def test_a_rotation_taken_in_part_is_written_so(form: Any, config: IsotuneConfig, tmp_path: Path) -> None:
    model = trained(unet(), dataclasses.replace(config, side="input" if form == "kohya" else "output"))
    whole = updates_of(model)
    for _, layer in adapted_layers(model, "default"):
        layer.set_scale("default", 0.5)
    assert all(relative_error(update, whole[name]) > 0.1 for name, update in updates_of(model).items())
    export_rotation(model, tmp_path / "a.safetensors", form)
    check_same(model, import_single(tmp_path / "a.safetensors", unet()))


CASES = ["diag-oft", "diag-oft-bounded", "diag-oft-rescaled", "boft", "boft-bounded-rescaled"]


@pytest.mark.filterwarnings("ignore:.*are bounded by their alpha")
@pytest.mark.parametrize("case", CASES)
def test_what_lycoris_wrote_is_written_again(case: str, tmp_path: Path) -> None:
    """The skew part of its own blocks, before a bound."""
    model = import_single(DATA / f"{case}.safetensors", Base())
    export_rotation(model, tmp_path / "a.safetensors", "lycoris")
    check_same(model, import_single(tmp_path / "a.safetensors", Base()))
    written, original = load_file(tmp_path / "a.safetensors"), load_file(DATA / f"{case}.safetensors")
    for key in (key for key in original if key.endswith("oft_blocks")):
        found, wanted = (t[key] - t[key].mT for t in (written, original))
        bound = 16 * float(original[key.replace("oft_blocks", "alpha")])
        wanted = wanted * min(1.0, bound / float(wanted.norm())) if bound else wanted
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:.*are bounded by their alpha")
@pytest.mark.parametrize("case", CASES)
def test_lycoris_itself_reads_it(case: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    model = import_single(DATA / f"{case}.safetensors", Base())
    export_rotation(model, tmp_path / "a.safetensors", "lycoris")
    base = Base()
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), base)
        assert len(network.loras) == 3
        for lora in network.loras:
            name = lora.lora_name.removeprefix("lycoris_")
            change = lora.get_merged_weight(multiplier=1)[0] - base.get_submodule(name).weight
            assert relative_error(change, updates_of(model)[name]) < 1e-5


@pytest.mark.parametrize(("form", "side"), [("kohya", "input"), ("lycoris", "output")])
def test_a_text_encoder(form: Any, side: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"oft_block_size": 4, "side": side, "target_modules": ["q_proj", "fc1"]}
    model = trained(tiny_text_encoder(), OFTConfig(**options))
    file = tmp_path / "a.safetensors"
    assert export_rotation(model, file, form, component="text_encoder_1") == 4
    assert all(key.startswith("lora_te1_text_model_encoder_layers_") for key in load_file(file))
    check_same(model, import_single(file, tiny_text_encoder()))


@pytest.mark.parametrize("config", [OFTConfig(oft_block_size=8), BOFTConfig(boft_block_size=8)], ids=["oft", "gain"])
def test_lycoris_has_as_many_blocks_as_one_has_rows(config: IsotuneConfig, tmp_path: Path) -> None:
    model = get_peft_model(Base(), dataclasses.replace(config, side="output", target_modules=["linear"]))
    with pytest.raises(ValueError, match=r"'.*linear' has 2 blocks of 8; .*blocks of at most 4, or export the merged"):
        export_rotation(model, tmp_path / "a.safetensors", "lycoris")
    assert not list(tmp_path.iterdir())


def test_why_lycoris_cannot_load_more_rows_than_blocks(tmp_path: Path) -> None:
    """Where it could one day, the refusal above is to go."""
    lycoris = pytest.importorskip("lycoris")
    tensors = {"lycoris_linear.oft_blocks": 0.1 * torch.ones(2, 8, 8), "lycoris_linear.alpha": torch.tensor(9.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="size of tensor"), torch.no_grad():
        lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), Base())


def test_layers_of_several_widths(tmp_path: Path) -> None:
    """LyCORIS' boft has as many factors as a layer's outputs allow, and its own sizes of blocks."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        deep = nn.ModuleDict({"a": nn.Linear(16, 48)})
        return nn.ModuleDict({"a": nn.Linear(6, 16), "deep": deep, "b": nn.Conv2d(2, 8, 3)})

    shapes = {"a": (3, 4, 4), "deep.a": (4, 8, 6), "b": (2, 2, 4)}
    blocks = {name: 0.2 * torch.randn(*shape, shape[-1]) for name, shape in shapes.items()}
    tensors = {f"lycoris_{name.replace('.', '_')}.oft_blocks": tensor for name, tensor in blocks.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    model = import_single(tmp_path / "a.safetensors", base())
    assert model.peft_config["default"].butterfly_factor_pattern == {"^deep\\.a": 4, "^b": 2}
    assert {layer.key: layer.adapter("default").generator.shape[:2] for layer in layers_of(model)} == {
        name: shape[:2] for name, shape in shapes.items()
    }
    export_rotation(model, tmp_path / "b.safetensors", "lycoris")
    check_same(model, import_single(tmp_path / "b.safetensors", base()))
    model.save_pretrained(str(tmp_path / "saved"))
    check_same(model, PeftModel.from_pretrained(base(), str(tmp_path / "saved")))


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for config, form, match in (
        (HRAConfig(r=2, target_modules=TARGETS), "kohya", "hold OFT and BOFT on the inputs"),
        (PsoftConfig(r=2, target_modules=TARGETS), "lycoris", "hold OFT and BOFT on the outputs"),
        (LYCORIS["oft"], "kohya", "OFTOperator on the outputs; kohya files can only hold OFT and BOFT on the inputs"),
        (KOHYA["exact"][0], "lycoris", "hold OFT and BOFT on the outputs"),
        (
            OFTConfig(oft_block_size=8, use_cayley_neumann=True, target_modules=TARGETS),
            "kohya",
            "supports only 3",
        ),
        (OFTConfig(oft_block_size=8, **SERIES, side="output", target_modules=TARGETS), "lycoris", "exact transform"),
        (
            BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, side="output", target_modules=TARGETS),
            "lycoris",
            "a butterfly of 2 factors with",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            export_rotation(get_peft_model(unet(), config), file, form)  # type: ignore[arg-type]
        assert not file.exists()


def test_the_command(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "base")
    for form, config in (("kohya", KOHYA["series"][0]), ("lycoris", LYCORIS["oft"])):
        model = trained(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base"), config)
        model.save_pretrained(tmp_path / form)  # type: ignore[operator]
        file = tmp_path / f"{form}.safetensors"
        arguments = ["export", str(tmp_path / form), "--to", form, "--base", str(tmp_path / "base"), "-o", str(file)]
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, done.output
        check_same(model, import_single(file, unet()))
        assert (
            CliRunner().invoke(cli.app, [*arguments[:-1], str(tmp_path / "b.safetensors"), "--rank", "4"]).exit_code
            == 2
        )


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(bytes(10))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isotune.files.tensors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export_rotation(trained(unet(), KOHYA["series"][0]), tmp_path / "a.safetensors", "kohya")
    assert not list(tmp_path.iterdir())
