"""A DINOv2 that a package carries as an ONNX graph, written as the folder of a model that transformers reads.

A graph that PyTorch exported keeps the names of the biases and norms, and loses those of the matrices of linear layers
and of the position embeddings. Each matrix is found by the bias that is added to its product. The file is read as data:
neither the graph nor the package is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

_HEAD_WIDTH = 64  # of every published DINOv2
_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_encoder(file: Path, prefix: str, folder: Path) -> None:
    """Write the encoder of an ONNX file into a folder: config.json, model.safetensors and preprocessor_config.json.

    Args:
        file: the ONNX file, with its weights inside.
        prefix: what the encoder's names begin with there, such as "backbone.".
        folder: is made.

    Raises:
        ValueError: the package onnx is missing, or the file holds no such encoder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError as error:
        raise ValueError(
            f"The model {file.name} is an ONNX file, which needs the package onnx: pip install onnx"
        ) from error
    try:
        graph = onnx.load(str(file), load_external_data=False).graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        weights = _named(graph, stored, prefix)
        config = _config(weights)
    except (OSError, DecodeError, LookupError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"{file} holds no DINOv2 encoder whose names begin with {prefix!r} ({error!r}).") from error
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2), encoding="utf-8")
    config.save_pretrained(folder)


def _named(graph: Any, stored: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The weights of the encoder by transformers' names."""
    weights = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(prefix) and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if node.op_type != "Add" or bias is None or product is None or product.op_type != "MatMul":
            continue
        matrix = next(name for name in product.input if name in stored)
        weights[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = stored[matrix].T
    width = weights["embeddings.cls_token"].shape[-1]
    nameless = [v for name, v in stored.items() if not name.startswith(prefix) and v.ndim == 3 and v.shape[-1] == width]
    # The position of the class token is one row, those of the patches are many.
    first, others = sorted((value for value in nameless if value.shape[0] == 1), key=lambda value: value.shape[1])
    weights["embeddings.position_embeddings"] = np.concatenate([first, others], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, width), np.float32)  # only pre-training reads it
    return {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}


def _config(weights: dict[str, Any]) -> Any:
    """The configuration that the shapes tell."""
    from transformers import Dinov2Config

    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    return Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=width,
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")),
        num_attention_heads=width // _HEAD_WIDTH,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        image_size=side * patch,
        patch_size=patch,
    )
