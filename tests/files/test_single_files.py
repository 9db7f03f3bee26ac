"""Single files of PEFT, kohya and OneTrainer without a configuration, against their formulas in plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import relative_error, tiny_unet
from isotune.errors import AdapterFileError
from isotune.files.adapter import describe
from isotune.files.diffusion.names import original_names, resolve
from isotune.files.diffusion.single import convert_single, import_single
from isotune.methods.config import IsotuneConfig
from isotune.tuner.state import adapted_layers

diffusers = pytest.importorskip("diffusers")

LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 8,
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": 8,
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": 8,
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2": 8,
    "down_blocks.0.attentions.0.proj_in": 8,
    "down_blocks.0.resnets.0.conv1": 8,
    "up_blocks.0.upsamplers.0.conv": 8,
    "mid_block.resnets.1.conv2": 8,
}
"""Linear layers and convolutions with kernels of 1 and of 3 -> block size."""


def unet(seed: int = 0) -> Any:
    return tiny_unet(seed)


def seeded(*shape: int, scale: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) * scale


def widths(base: nn.Module) -> dict[str, int]:
    return {name: base.get_submodule(name).weight[0].numel() for name in LAYERS}


def series(weight: Tensor, size: int) -> Tensor:
    """R of rows of the strict upper triangle, five terms: I + 2Q + 2Q² + 2Q³ + Q⁴."""
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(len(weight), size, size, dtype=torch.float64)
    upper[:, rows, columns] = weight.double()
    q = upper - upper.mT
    return torch.eye(size, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def rotated(weight: Tensor, blocks: Tensor) -> Tensor:
    """What kohya and OneTrainer compute: y = W (x R) on linear layers, and kernels W R on convolutions."""
    matrix = weight.double().flatten(1)
    r = torch.block_diag(*blocks.expand(matrix.shape[1] // blocks.shape[-1], -1, -1))
    return (matrix @ (r.T if weight.ndim == 2 else r)).reshape(weight.shape)


def update_error(model: nn.Module, base: nn.Module, expected: dict[str, Tensor]) -> float:
    """The worst relative error of a layer's update, and that no other layer is adapted."""
    layers = dict(adapted_layers(model, "default"))
    assert layers.keys() == expected.keys()
    errors = []
    for name, layer in layers.items():
        weight = base.get_submodule(name).weight.detach().double()
        change = expected[name] - weight
        assert change.norm() > 1e-2 * weight.norm()
        errors.append(
            float((layer.get_delta_weight("default").double().reshape(weight.shape) - change).norm() / change.norm())
        )
    return max(errors)


def oft_file(rows: Callable[[int], int] = lambda blocks: blocks, scale: float = 0.1) -> dict[str, Tensor]:
    """Module name -> a stored weight."""
    return {
        name: seeded(rows(width // LAYERS[name]), LAYERS[name] * (LAYERS[name] - 1) // 2, scale=scale).float()
        for name, width in widths(unet()).items()
    }


def expected_of(weights: dict[str, Tensor], divisor: float = 1.0) -> dict[str, Tensor]:
    base = unet()
    return {
        name: rotated(base.get_submodule(name).weight.detach(), series(weight / divisor, LAYERS[name]))
        for name, weight in weights.items()
    }


NAMES: dict[str, Callable[[str], str]] = {
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    "kohya sdxl": lambda name: "lora_unet_" + original_names(unet())[name].replace(".", "_"),
    "omi": lambda name: "unet." + original_names(unet())[name],
    "omi of kohya": lambda name: "unet." + name,
    "lycoris": lambda name: "lycoris_" + name.replace(".", "_"),
    "bare": lambda name: name,
}


@pytest.mark.parametrize("naming", NAMES)
def test_oft_under_every_name(naming: str, tmp_path: Path) -> None:
    weights = oft_file()
    file = tmp_path / "a.safetensors"
    save_file({NAMES[naming](name) + ".oft_R.weight": weight for name, weight in weights.items()}, file)
    model = import_single(file, unet())
    assert update_error(model, unet(), expected_of(weights)) < 1e-5
    config = model.peft_config["default"]
    assert (config.num_cayley_neumann_terms, config.use_cayley_neumann, config.block_share) == (3, True, False)


def test_one_block_for_all_scaled_and_half_precision(tmp_path: Path) -> None:
    weights = oft_file(lambda blocks: 1, scale=0.5)
    file = tmp_path / "a.safetensors"
    stored = {NAMES["kohya"](name): weight.bfloat16() for name, weight in weights.items()}
    tensors = {f"{stem}.oft_R.weight": weight for stem, weight in stored.items()}
    flags = {f"{stem}.oft_R.scaled_oft": torch.tensor(True) for stem in stored}
    save_file({**tensors, **flags}, file)
    model = import_single(file, unet())
    assert model.peft_config["default"].block_share
    assert model.peft_config["default"].scaled_generator  # trained on, it keeps its learning rate
    for name, layer in adapted_layers(model, "default"):
        assert torch.equal(layer.adapter("default").generator.abs(), weights[name].bfloat16().float().abs())
    expected = expected_of({name: weight.bfloat16().float() for name, weight in weights.items()}, divisor=2 * 7**0.5)
    assert update_error(model, unet(), expected) < 1e-5
    save_file({**tensors, **{key: torch.tensor(1) for key in flags}}, file)
    with pytest.raises(AdapterFileError, match=r"scaled_oft is an integer.*released OneTrainer"):
        import_single(file, unet())
    # isotune has one option for all layers: where only some are scaled, these are divided.
    some = sorted(flags)[0]
    save_file({**tensors, some: flags[some]}, file)
    model = import_single(file, unet())
    assert not model.peft_config["default"].scaled_generator
    (only_one,) = (name for name in weights if some.startswith(NAMES["kohya"](name) + "."))
    halves = {
        name: weight.bfloat16().float() / (2 * 7**0.5 if name == only_one else 1) for name, weight in weights.items()
    }
    assert update_error(model, unet(), expected_of(halves)) < 1e-5
    # What only some layers share is written out.
    mixed = oft_file(lambda blocks: 1) | {name: oft_file()[name] for name in list(LAYERS)[:2]}
    save_file({NAMES["kohya"](name) + ".oft_R.weight": weight for name, weight in mixed.items()}, file)
    model = import_single(file, unet())
    assert not model.peft_config["default"].block_share
    assert update_error(model, unet(), expected_of(mixed)) < 1e-5


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"conv_in": 36, "mid_block.resnets.1.conv2": 36}, {"oft_block_size": 36, "block_size_pattern": {}}),
        ({"conv_in": 9, "down_blocks.0.attentions.0.proj_in": 8}, {"r": 4}),
        ({"conv_in": 4, "mid_block.resnets.1.conv2": 18}, {"oft_block_size": 4}),
    ],
    ids=str,
)
def test_layers_may_have_blocks_of_their_own_sizes(
    sizes: dict[str, int], expected: dict[str, Any], tmp_path: Path
) -> None:
    base, weights = unet(), {}
    for name, size in sizes.items():
        weights[name] = (
            seeded(base.get_submodule(name).weight[0].numel() // size, size * (size - 1) // 2).float() / size
        )
    file = tmp_path / "a.safetensors"
    save_file({NAMES["kohya"](name) + ".oft_R.weight": weight for name, weight in weights.items()}, file)
    model = import_single(file, unet())
    config = model.peft_config["default"]
    assert {name: getattr(config, name) for name in expected} == expected
    wanted = {n: rotated(base.get_submodule(n).weight.detach(), series(w, sizes[n])) for n, w in weights.items()}
    assert update_error(model, base, wanted) < 1e-5


def butterfly(stages: Tensor) -> Tensor:
    """The product of a butterfly's factors in kohya's order: even chunks of half a block first, then odd ones."""
    factors, blocks, size, _ = stages.shape
    total = torch.eye(blocks * size, dtype=torch.float64)
    for i, own in enumerate(stages.double()):
        skew = (own - own.mT) / 2
        eye = torch.eye(size, dtype=torch.float64)
        diagonal = torch.block_diag(*((eye - skew) @ torch.linalg.inv(eye + skew)))
        order = torch.arange(blocks * size)
        if factors > 1:
            chunks = order.view(blocks // 2**i, -1, size // 2)
            order = torch.cat([chunks[:, 0::2], chunks[:, 1::2]], dim=1).flatten()
        permutation = torch.eye(blocks * size, dtype=torch.float64)[order]
        total = permutation @ diagonal @ permutation.T @ total
    return total


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft(factors: int, tmp_path: Path) -> None:
    base, tensors, expected = unet(), {}, {}
    for number, (name, width) in enumerate(widths(base).items()):
        if width % 32:
            continue
        weight = base.get_submodule(name).weight.detach()
        stages = seeded(factors, width // 8, 8, 8, scale=0.2)
        gain = 1 + seeded(len(weight), 1)
        tensors[NAMES["kohya"](name) + ".boft_R"] = stages.float()
        tensors[NAMES["kohya"](name) + ".boft_s"] = gain.float().T.contiguous() if number == 1 else gain.float()
        expected[name] = (gain * (weight.double().flatten(1) @ butterfly(stages).T)).reshape(weight.shape)
    save_file(tensors, tmp_path / "a.safetensors")
    model = import_single(tmp_path / "a.safetensors", unet())
    assert model.peft_config["default"].boft_n_butterfly_factor == factors
    assert update_error(model, base, expected) < 1e-5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 20, bias=False)
        self.conv = nn.Conv1d(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.tanh(self.up(x)))
        return result


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(oft_block_size=8, target_modules=["up", "down"]),
        peft.BOFTConfig(boft_block_size=4, target_modules=["up", "down"]),
    ],
    ids=["oft", "boft"],
)
def test_peft_itself(config: peft.PeftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    theirs, x = peft.get_peft_model(net(), config), torch.randn(7, 32)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.save_pretrained(tmp_path / "theirs")
        file = tmp_path / "alone.safetensors"
        save_file(load_file(tmp_path / "theirs/adapter_model.safetensors"), file)
        found, before, wanted = import_single(file, net())(x), net()(x), theirs.eval()(x)
    assert relative_error(found - before, wanted - before) < 1e-5


def test_peft_on_a_convolution_is_refused(tmp_path: Path) -> None:
    save_file({"base_model.model.conv.oft_R.weight": torch.ones(3, 6)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="'conv': PEFT rotates each of a convolution's overlapping patches"):
        import_single(tmp_path / "a.safetensors", net())


# -- names ------------------------------------------------------------------------------------------------------------


def test_the_original_names_are_those_that_diffusers_reads() -> None:
    """Its own conversion gets back the names of its modules, on SDXL's layout of blocks."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    torch.manual_seed(0)
    sdxl = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    inner = {
        name: original
        for name, original in original_names(sdxl).items()
        if isinstance(sdxl.get_submodule(name), nn.Linear | nn.Conv2d)
    }
    assert inner["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert inner["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert inner["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert inner["conv_in"] == "input_blocks.0.0"
    assert len(set(inner.values())) == len(inner)
    attention = {name: original for name, original in inner.items() if "attentions" in name}
    assert len(attention) > 100
    state = {f"lora_unet_{original.replace('.', '_')}.lora_up.weight": name for name, original in attention.items()}
    back = _maybe_map_sgm_blocks_to_diffusers(dict(state), sdxl.config)
    renamed = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
    for old, new in renamed.items():  # its second step
        back = {key.replace(old, new): value for key, value in back.items()}
    assert back == {f"lora_unet_{name.replace('.', '_')}.lora_up.weight": name for name in attention}
    assert resolve([original.replace(".", "_") for original in inner.values()], sdxl, "") == {
        original.replace(".", "_"): name for name, original in inner.items()
    }


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.Linear(8, 8)
        self.a = nn.ModuleDict({"b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    weight = torch.ones(1, 28)

    def refused(tensors: dict[str, Tensor], match: str, base: nn.Module | None = None) -> None:
        save_file(tensors, file)
        base = Twins() if base is None else base
        before = {name: parameter.clone() for name, parameter in base.named_parameters()}
        with pytest.raises(AdapterFileError, match=match) as error:
            import_single(file, base)
        assert "\n" not in str(error.value)
        after = dict(base.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    refused({"lora_unet_a_b.oft_R.weight": weight}, r"more than one layer: a_b \(a\.b or a_b\)")
    names = {f"lora_unet_{name}.oft_R.weight": weight.clone() for name in ("x", "a_c", "y")}
    refused(names, "mean no layer of this base model: x, y")
    refused(
        {"lora_unet_a_c.oft_R.weight": weight, "unet.a.c.oft_R.weight": weight.clone()},
        "same layer as another: a.c, a_c",
    )
    refused({"lora_unet_a_c.oft_R.weight": torch.ones(2, 28)}, "does not fit blocks of its 8 inputs")
    refused({"lora_unet_a_c.oft_R.weight": torch.ones(1, 27)}, "does not fit blocks of its 8 inputs")
    refused({"lora_unet_a_c.oft_R.scaled_oft": torch.tensor(True)}, "do not make a known method")
    refused({"lora_unet_a_c.oft_R.weight": weight * torch.nan}, "oft_R.weight")
    lora = {"lora_unet_a_c.lora_up.weight": torch.ones(2), "lora_unet_a_c.oft_R.weight": weight}
    refused(lora, r"lora_up\.weight \(1\).*not a rotation that can be imported")
    refused({"lora_unet_a_c.oft_R.weight": weight, "lora_unet_a_c.dora_scale": torch.ones(8)}, r"dora_scale \(1\)")
    boft = {"lora_unet_a_c.boft_R": torch.ones(1, 2, 4, 4), "lora_unet_a_c.boft_s": torch.ones(8, 1)}
    refused({**boft, "unet.a.b.oft_R.weight": weight}, "mixes methods .*BOFT on 'a_c', OFT on 'a.b'")
    refused({**boft, "lora_unet_a_c.oft_R.weight": weight}, "do not make a known method")
    refused({"lora_unet_a_c.boft_R": torch.ones(1, 2, 4, 4)}, "boft_s of 2 dimensions.*holds none")
    refused({**boft, "lora_unet_a_c.boft_s": torch.ones(9, 1)}, "do not fit its weight, 8 × 8")
    two = {"lora_unet_a_c.oft_R.weight": weight, "lora_te1_a_c.oft_R.weight": weight.clone()}
    refused(two, r"several models \(text_encoder, unet\)")
    file.write_bytes(b"PK not safetensors")
    with pytest.raises(AdapterFileError, match="cannot be read as a safetensors file"):
        import_single(file, Twins())


# -- the command --------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["import", *map(str, arguments)])


def test_the_command_on_a_model_of_diffusers(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "unet")
    weights = oft_file()
    save_file({NAMES["kohya"](n) + ".oft_R.weight": w for n, w in weights.items()}, tmp_path / "a.safetensors")
    done = run(tmp_path / "a.safetensors", "--base", tmp_path / "unet", "-o", tmp_path / "ours")
    assert done.exit_code == 0, done.output
    assert describe(tmp_path / "ours").config.base_model_name_or_path == str(tmp_path / "unet")
    model = PeftModel.from_pretrained(unet(), tmp_path / "ours")
    assert update_error(model, unet(), expected_of(weights)) < 1e-5
    done = run(tmp_path / "a.safetensors", "-o", tmp_path / "other")
    assert done.exit_code == 2
    assert "does not name its base model" in done.output


def test_the_command_on_a_pipeline(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    unet().save_pretrained(tmp_path / "sd/unet")
    text.save_pretrained(tmp_path / "sd/text_encoder")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", ""], "text_encoder": ["transformers", ""]}
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    inner = "text_model_encoder_layers_0_self_attn_q_proj"
    weight = seeded(2, 28).float()
    tensors = {NAMES["kohya"](name) + ".oft_R.weight": w for name, w in oft_file().items()}
    tensors[f"lora_te_{inner}.oft_R.weight"] = weight
    save_file(tensors, tmp_path / "a.safetensors")
    done = run(tmp_path / "a.safetensors", "--base", tmp_path / "sd", "-o", tmp_path / "ours")
    assert done.exit_code == 0, done.output
    model = PeftModel.from_pretrained(unet(), tmp_path / "ours/unet")
    assert update_error(model, unet(), expected_of(oft_file())) < 1e-5
    adapted = dict(adapted_layers(PeftModel.from_pretrained(text, tmp_path / "ours/text_encoder"), "default"))
    ((name, layer),) = adapted.items()
    assert name.endswith("encoder.layers.0.self_attn.q_proj")
    base = layer.unmerged_matrix().double()
    change = rotated(base, series(weight, 8)) - base
    assert relative_error(layer.get_delta_weight("default").double(), change) < 1e-5
    tensors["lora_te2_x.oft_R.weight"] = weight.clone()
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"holds text_encoder_2, but the pipeline in .* has text_encoder, unet"):
        convert_single(tmp_path / "a.safetensors", tmp_path / "other", str(tmp_path / "sd"))
    assert not (tmp_path / "other").exists()


def test_a_file_beside_its_configuration_is_read_with_it(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=8, target_modules=["query"], use_cayley_neumann=False)
    from helpers import tiny_bert

    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/adapter_model.safetensors"
    done = run(file, "--base", tmp_path / "base", "-o", tmp_path / "ours")
    assert done.exit_code == 0, done.output
    config_: IsotuneConfig = describe(tmp_path / "ours").config
    assert not config_.use_cayley_neumann  # type: ignore[attr-defined]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 16)


@pytest.mark.parametrize(
    ("key", "tensors", "reason"),
    [
        ("oft_blocks", {"oft_blocks": seeded(4, 4, 4, scale=1e300)}, "beyond float32"),
        ("oft_R.weight", {"oft_R.weight": seeded(3, 1, scale=1e300)}, "beyond float32"),
        ("flags", {"oft_R.weight": seeded(3, 1), "oft_R.scaled_oft": torch.tensor([True, False])}, "has 2 values"),
        ("none", {"oft_R.weight": seeded(3, 1), "oft_R.scaled_oft": torch.zeros(0)}, "has 0 values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_no_adapter_has(key: str, tensors: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    save_file({f"linear.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    base = Small()
    with pytest.raises(AdapterFileError, match=reason):
        import_single(tmp_path / "a.safetensors", base)
    assert type(base.linear) is nn.Linear


def test_an_alpha_that_is_an_integer(tmp_path: Path) -> None:
    """As torch.tensor(1) is one."""
    found = []
    for alpha in (torch.tensor(1), torch.tensor(1.0)):
        save_file({"linear.oft_blocks": seeded(4, 4, 4), "linear.alpha": alpha}, tmp_path / "a.safetensors")
        model = import_single(tmp_path / "a.safetensors", Small())
        (found_here,) = dict(adapted_layers(model, "default")).values()
        found.append(found_here.get_delta_weight("default"))
    assert torch.equal(*found)
