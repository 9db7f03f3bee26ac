"""Importing folders of eigentune, and training beside it: the same function, and the same losses."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stored_versions import Base, inputs
from torch import Tensor, nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import layers_of, tiny_llama
from isotune import PeftModel
from isotune.errors import AdapterFileError, BaseMismatchError
from isotune.files.eigentune import import_eigentune

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "eigentune"
CONFIG, WEIGHTS = "eigentune_config.json", "adapter_model.safetensors"
SVFIT = {
    "diagonal": "top",
    "diagonal-embedded": "top",
    "diagonal-budget": "top",
    "diagonal-minor": "bottom",
    "diagonal-relative-mixed": "mixed",
}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(inputs())
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to what the adapter changes."""
    base = output(Base())
    assert (expected - base).norm() > 0.1
    return float((found - expected).norm() / (expected - base).norm())


@pytest.mark.parametrize("name", sorted(folder.name for folder in DATA.iterdir() if folder.is_dir()))
def test_an_imported_folder_computes_what_eigentune_s_own_loaded_model_computes(name: str, tmp_path: Path) -> None:
    expected = load_file(DATA / name / "expected.safetensors")["output"]
    model: Any = import_eigentune(DATA / name, Base())
    assert error(output(model), expected) < 1e-5
    config = model.peft_config["default"]
    if name in SVFIT:
        assert (config.peft_type.value, config.selection, config.basis) == ("ISOTUNE_SVFIT", SVFIT[name], "pinned")
    else:
        assert (config.peft_type.value, config.psoft_orth) == ("ISOTUNE_PSOFT", False)
        assert config.basis == ("pinned" if name == "core" else "embedded")
    if name == "diagonal-budget":
        assert sum(layer.adapter("default").size for layer in layers_of(model)) == 8
    model.save_pretrained(tmp_path)
    assert error(output(PeftModel.from_pretrained(Base(), tmp_path)), expected) < 1e-4


def changed(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a stored folder whose configuration, or tensors, are changed."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    header = json.loads((copy / CONFIG).read_text())
    header["config"] |= {key: value for key, value in changes.items() if key in header["config"]}
    header |= {key: value for key, value in changes.items() if key in header}
    (copy / CONFIG).write_text(json.dumps(header))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; only version 1"),
        ({"layers": {}}, "should hold a config and the adapted layers"),
        ({"layers": {"up": 3}}, "should hold an object for each layer"),
        ({"method": "dense"}, "method is 'dense'; diagonal, spectral_core"),
        ({"rank": "5"}, "rank is '5'"),
        ({"selection": "all"}, "selection is 'all'"),
        ({"method": "spectral_core"}, r"'up': .*holds \['delta'\] for it instead of \['core'\]"),
        ({"bases_embedded": True}, r"instead of \['S', 'U', 'Vh', 'delta'\]"),
        ({"layers": {"up": {"fp": "", "sig": []}}}, "holds tensors of 'down', which"),
    ],
)
def test_damaged_folders_are_refused_before_anything_changes(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = Base()
    with pytest.raises(AdapterFileError, match=message):
        import_eigentune(changed(DATA / "diagonal", tmp_path, **changes), base)
    assert torch.equal(output(base), output(Base()))
    assert not any("isotune" in name for name, _ in base.named_modules())


def test_a_signature_of_other_singular_vectors_is_refused(tmp_path: Path) -> None:
    layers = json.loads((DATA / "core" / CONFIG).read_text())["layers"]
    layers["up"]["sig"][1] *= -1
    with pytest.raises(AdapterFileError, match=r"'up'.*come out differently on this machine.*save_bases=True"):
        import_eigentune(changed(DATA / "core", tmp_path, layers=layers), Base())


def test_bases_found_approximately_must_be_in_the_file(tmp_path: Path) -> None:
    folder = changed(DATA / "diagonal-approximate", tmp_path, bases_embedded=False)
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if key.endswith("delta")}, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"were found approximately.*save_bases=True"):
        import_eigentune(folder, Base())


def test_another_base_and_another_model_are_refused() -> None:
    base = Base()
    with torch.no_grad():
        base.down.weight[0, 0] += 1e-3
    with pytest.raises(BaseMismatchError, match="the weight of 'down' is not the one"):
        import_eigentune(DATA / "diagonal", base)
    with pytest.raises(BaseMismatchError, match="the same base model in the same dtype"):
        import_eigentune(DATA / "diagonal", Base().double())
    with pytest.raises(AdapterFileError, match="no such module"):
        import_eigentune(DATA / "diagonal", nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("content", [b"", b"\x80\x04}q\x00."])
def test_nothing_is_unpickled(content: bytes, tmp_path: Path) -> None:
    folder = changed(DATA / "diagonal", tmp_path)
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"cannot be read as a safetensors file.*save the adapter again"):
        import_eigentune(folder, Base())


def test_the_command_line_knows_such_a_folder(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli.app, ["import", str(DATA / "diagonal"), "-o", str(tmp_path / "out")])
    assert found.exit_code
    assert "does not name its base model" in found.output
    tiny_llama().save_pretrained(tmp_path / "base")
    options = ["--base", str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(cli.app, ["import", str(DATA / "diagonal"), *options])
    assert found.exit_code
    assert "no such module" in found.output
    assert not (tmp_path / "out").exists()


# -- beside eigentune itself -------------------------------------------------------------------------------------------


@pytest.fixture
def eigentune() -> Any:
    return pytest.importorskip("eigentune")


@pytest.mark.parametrize("selection", ["principal", "minor", "mixed"])
def test_training_beside_eigentune_gives_the_same_losses(eigentune: Any, selection: str) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "svfit.py"))
    found = script["compare"](tiny_llama, rank=5, steps=8, selection=selection)
    assert found["parameters"][0] == found["parameters"][1] == 14 * 5
    assert max(found["differences"]) < 1e-5
    assert found["losses"][0] - found["losses"][-1] > 0.01


def test_weak_directions_that_eigentune_rounds_are_its_scales_still(eigentune: Any, tmp_path: Path) -> None:
    """The left singular vectors of its float32 decomposition are W v / σ to ε σ₁ / σ only."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64)).Q for _ in range(2))
        layer = nn.Linear(48, 48)
        layer.weight.data = ((left * torch.logspace(0, -4, 48, dtype=torch.float64)) @ right).float()
        return nn.Sequential(layer)

    model = eigentune.get_eigentune_model(base(), eigentune.EigenTuneConfig(rank=6, selection="minor"))
    with torch.no_grad():
        model[0].delta.copy_(torch.linspace(-0.2, 0.3, 6))
    eigentune.save_adapter(model, str(tmp_path))
    ours: Any = import_eigentune(tmp_path, base())
    assert ours.peft_config["default"].peft_type.value == "ISOTUNE_SVFIT"
    x = torch.randn(7, 48)
    expected, plain = model(x), base()(x)
    assert 1e-7 < float((ours(x) - expected).norm() / (expected - plain).norm()) < 5e-3


def test_a_folder_of_eigentune_is_converted_on_the_command_line(eigentune: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    model = eigentune.get_eigentune_model(
        base(), eigentune.EigenTuneConfig(rank=5, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    eigentune.save_adapter(model, str(tmp_path / "theirs"))
    found = CliRunner().invoke(cli.app, ["import", str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")])
    assert not found.exit_code, found.output
    tokens = torch.arange(4, 18).reshape(2, 7)
    with torch.no_grad():
        plain, expected = base()(tokens).logits, model(tokens).logits
        ours = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()(tokens).logits
    assert float((ours - expected).norm() / (expected - plain).norm()) < 1e-4
