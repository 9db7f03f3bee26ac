"""A DINOv2 in an ONNX file becomes a folder that transformers loads, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isotune.files import base_model
from isotune.files.base_model import load_base, resolve_base
from isotune.files.onnx_encoder import write_encoder

onnx = pytest.importorskip("onnx")
helper = onnx.helper

WIDTH, PATCH, SIDE = 64, 4, 3
OLD_NAMES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


@pytest.fixture
def encoder() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=1, image_size=PATCH * SIDE, patch_size=PATCH
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.embeddings.mask_token.zero_()  # no graph has it
    return model.eval()


def exported(model: Any, folder: Path) -> Path:
    """A package with the weights as an export leaves them: matrices transposed, multiplied, and without names."""
    stored, nodes = {}, []
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    for old, new in OLD_NAMES.items():  # as files still have them, whatever transformers calls them
        weights = {name.replace(f"attention.{old}", f"attention.{new}"): value for name, value in weights.items()}
    position = weights.pop("embeddings.position_embeddings")
    weights.pop("embeddings.mask_token")
    stored["onnx::Concat_9"], stored["onnx::Reshape_8"] = position[:, :1], position[:, 1:]
    for number, (name, value) in enumerate(weights.items()):
        if value.ndim == 2:
            stored[f"onnx::MatMul_{number}"] = np.ascontiguousarray(value.T)
            bias = f"backbone.{name.removesuffix('weight')}bias"
            nodes.append(helper.make_node("MatMul", [f"in{number}", f"onnx::MatMul_{number}"], [f"product{number}"]))
            nodes.append(helper.make_node("Add", [bias, f"product{number}"], [f"out{number}"]))
        else:
            stored[f"backbone.{name}"] = value
    stored["decoder.weight"] = np.ones((2, 3, 4, 4), np.float32)
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in stored.items()]
    file = folder / "a_package" / "net.onnx"
    file.parent.mkdir()
    file.with_name("__init__.py").write_text("raise RuntimeError('imported')")
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], tensors)), file)
    return file


def test_a_package_is_read_once_and_never_imported(
    encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = exported(encoder, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(base_model._ONNX_FILES, "a_package", ("net.onnx", "backbone."))
    loaded = load_base("package:a_package")
    pixels = torch.randn(2, 3, 20, 20)  # of another size than the model's
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).last_hidden_state, encoder(pixels).last_hidden_state)
    file.unlink()
    folder = Path(resolve_base("package:a_package"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["a_package"]


def test_another_file_is_refused_and_nothing_is_left(encoder: Any, tmp_path: Path) -> None:
    file = exported(encoder, tmp_path)
    other = tmp_path / "other.onnx"
    other.write_bytes(b"no model")
    for path, prefix in ((file, "encoder."), (other, "backbone."), (tmp_path / "missing.onnx", "backbone.")):
        with pytest.raises(ValueError, match=f"{path.name} holds no DINOv2 encoder whose names begin with '{prefix}'"):
            write_encoder(path, prefix, tmp_path / "model")
    assert not (tmp_path / "model").exists()
