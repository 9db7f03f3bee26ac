"""Reading adapter folders and placing them on a base."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from helpers import tiny_opt
from isotune import PeftModel, PsoftConfig, get_peft_model
from isotune.errors import AdapterFileError, BaseMismatchError
from isotune.files.adapter import describe, new_directory
from isotune.files.peft_import import import_peft


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=40)
    return BertForSequenceClassification(config).eval()


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
        describe(folder).place(tiny_opt())


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
    for kind in ("PSOFT", "OFT", "BOFT", "HRA"):
        config.write_text(json.dumps({**json.loads(text), "peft_type": kind}))
        with pytest.raises(AdapterFileError, match=rf"'{kind}'.*ISOTUNE_PSOFT.*isotune import"):
            describe(folder)
    for kind in (["x"], {}, None, 5):
        config.write_text(json.dumps({**json.loads(text), "peft_type": kind}))
        with pytest.raises(AdapterFileError, match=rf"of type {re.escape(repr(kind))}; isotune's own types are"):
            describe(folder)
        with pytest.raises(AdapterFileError, match=rf"of type {re.escape(repr(kind))}; only PEFT's"):
            import_peft(folder, bert())
    config.write_text(json.dumps({**json.loads(text), "psoft_orth": False}))
    file = describe(folder)
    with pytest.raises(AdapterFileError, match="size mismatch"):
        file.operator(next(iter(file.layers)))
    with pytest.raises(AdapterFileError, match="size mismatch"):
        file.place(bert())


def test_a_new_folder_is_in_nobodys_way(tmp_path: Path) -> None:
    """A name as long as a file system allows, and what a process of the same number left that was killed."""
    target = tmp_path / ("漢" * 80)
    (tmp_path / f".{target.name}.{os.getpid()}.partial").mkdir()
    with new_directory(target) as folder:
        (folder / "a").write_text("b")
    assert (target / "a").read_text() == "b"


def test_a_folder_at_which_another_file_system_begins_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with (
        pytest.raises(ValueError, match=r"another file system begins at .*mounted.*; give a folder in it"),
        new_directory(tmp_path / "mounted"),
    ):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]
