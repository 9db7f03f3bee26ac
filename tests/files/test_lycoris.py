"""Files that LyCORIS itself saved (tests/data/lycoris/make.py), against the weights that it merged."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import relative_error
from isotune.errors import AdapterFileError, IsotuneWarning
from isotune.files.diffusion.single import import_single
from isotune.tuner.state import adapted_layers

DATA = Path(__file__).parents[1] / "data/lycoris"
CASES = {
    "diag-oft": ("ISOTUNE_OFT", False),
    "diag-oft-bounded": ("ISOTUNE_OFT", True),
    "diag-oft-rescaled": ("ISOTUNE_BOFT", False),
    "boft": ("ISOTUNE_BOFT", False),
    "boft-bounded-rescaled": ("ISOTUNE_BOFT", True),
}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 16)
        self.conv = nn.Conv2d(2, 16, 3)
        self.point = nn.Conv2d(6, 16, 1)
        self.load_state_dict(load_file(DATA / "base.safetensors"))


def updates_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_delta_weight("default") for name, layer in adapted_layers(model, "default")}


@pytest.mark.parametrize("case", CASES)
def test_imported_is_what_lycoris_computes(case: str, tmp_path: Path) -> None:
    kind, bounded = CASES[case]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = import_single(DATA / f"{case}.safetensors", Base())
    told = [str(one.message) for one in said if one.category is IsotuneWarning]
    assert ["ComfyUI bounds by alpha alone" in text for text in told] == [True] * bounded
    config = model.peft_config["default"]
    assert (config.peft_type.value, config.side) == (kind, "output")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Base(), tmp_path)
    base = Base()
    for name, merged in load_file(DATA / f"{case}-merged.safetensors").items():
        change = merged - base.get_submodule(name).weight.detach()
        assert change.norm() > 0.1
        for found in (model, again):
            assert relative_error(updates_of(found)[name], change) < 1e-5, name


def test_under_the_names_of_kohya_and_with_what_is_wrong(tmp_path: Path) -> None:
    file, stored = tmp_path / "a.safetensors", load_file(DATA / "diag-oft.safetensors")
    wanted = updates_of(import_single(DATA / "diag-oft.safetensors", Base()))

    def named(prefix: str, **changed: Tensor) -> None:
        tensors = {key.replace("lycoris_", prefix): tensor for key, tensor in stored.items()}
        tensors = {key: changed.get(key.split(".")[1], tensor) for key, tensor in tensors.items()}
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, file)

    large = torch.tensor(10.0)
    for prefix in ("lora_unet_", "oft_unet_", "unet."):
        named(prefix, alpha=large)
        found = updates_of(import_single(file, Base()))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    named("oft_unet_")
    with pytest.raises(AdapterFileError, match="alpha is 0: kohya's own module then does not rotate"):
        import_single(file, Base())
    named("lora_unet_", alpha=torch.tensor(-1.0))
    with pytest.raises(AdapterFileError, match="alpha, which bounds the rotation"):
        import_single(file, Base())
    named("lora_unet_", oft_blocks=torch.ones(3, 4, 4))
    with pytest.raises(AdapterFileError, match=r"\(3, 4, 4\) do not fit blocks of its 16 outputs"):
        import_single(file, Base())
    named("lora_unet_", oft_blocks=torch.ones(4, 4))
    with pytest.raises(AdapterFileError, match="do not make a known method"):
        import_single(file, Base())
    save_file({"lora_unet_conv.alpha": large}, file)
    with pytest.raises(AdapterFileError, match="holds alpha for 'conv', which do not make a known method"):
        import_single(file, Base())
    # kohya's split blocks of FLUX
    save_file({"lora_unet_conv.oft_blocks.0": torch.ones(4, 4, 4)}, file)
    with pytest.raises(AdapterFileError, match=r"oft_blocks\.0'.*not a rotation that can be imported"):
        import_single(file, Base())
