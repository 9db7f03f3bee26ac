"""Exported folders are what vLLM and llama.cpp's converter read, checked by their own rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import FAMILIES, randomize, tiny_bert, tiny_llama
from isotune import HRAConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.files.export_lora import export_lora
from isotune.files.lora_servers import VLLM_RANKS, describe_obstacles, obstacles, vllm_max_rank
from isotune.methods.config import IsotuneConfig


def exported(folder: Path, config: IsotuneConfig, family: str = "llama", **options: Any) -> Path:
    model = get_peft_model(FAMILIES[family](), config)
    randomize(model, std=0.2)
    export_lora(model, folder / "lora", **options)
    return folder / "lora"


def vllm_reads(folder: Path, room: int) -> dict[str, Tensor]:
    """The update of every module as vLLM's loader would have it: one r and one alpha, and factors by their names.

    After vllm.lora.peft_helper and vllm.lora.utils.parse_fine_tuned_lora_name of 0.22.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list | str)
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["r"] <= room
    assert room in VLLM_RANKS
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        assert name.startswith("base_model.model.")
        assert parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B")
        assert tensor.shape[0 if parts[-2] == "lora_A" else 1] <= room
        factors.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    scale = config["lora_alpha"] / config["r"]
    return {module: scale * (own["lora_B"] @ own["lora_A"]) for module, own in factors.items()}


def llama_cpp_reads(folder: Path, architecture: str, layers: int) -> dict[str, Tensor]:
    """The update of every GGUF tensor as llama.cpp would scale it, after its converter's names and its get_scale."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), layers)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        kind = re.search(r"\.(lora_[AB])\.weight$", name)
        assert kind, f"Unexpected name '{name}': Not a lora_A or lora_B tensor"
        base_name = name.replace("base_model.model.", "").replace(f".{kind[1]}.weight", ".weight")
        mapped = names.get_name(base_name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, base_name
        pairs.setdefault(mapped, {})[kind[1]] = tensor
    return {
        mapped: float(config["lora_alpha"]) / own["lora_B"].shape[1] * (own["lora_B"] @ own["lora_A"])
        for mapped, own in pairs.items()
    }


EXPORTS: dict[str, tuple[IsotuneConfig, dict[str, Any]]] = {
    "psoft": (PsoftConfig(r=12, target_modules="all-linear"), {}),
    "hra": (HRAConfig(r=4, target_modules=["q_proj", "down_proj"]), {}),
    "oft-rank": (OFTConfig(oft_block_size=8, target_modules="all-linear"), {"rank": 16}),
    "oft-energy": (
        OFTConfig(oft_block_size=8, target_modules="all-linear"),
        {"energy": 0.9, "uniform_rank": True},
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_servers_read_the_update(name: str, tmp_path: Path) -> None:
    config, options = EXPORTS[name]
    folder = exported(tmp_path, config, **options)
    assert obstacles(folder) == {"vLLM": [], "llama.cpp": []}
    r = json.loads((folder / "adapter_config.json").read_text())["r"]
    room = vllm_max_rank(r)
    assert room is not None
    assert f"--max-lora-rank {room}" in describe_obstacles(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[key.replace("_A", "_B")] @ down
        for key, down in tensors.items()
        if key.endswith("lora_A.weight")
    }
    found = vllm_reads(folder, room)
    assert found.keys() == expected.keys()
    linear = {n for n, m in tiny_llama().named_modules() if isinstance(m, torch.nn.Linear)}
    assert expected.keys() <= linear
    for module, update in expected.items():
        torch.testing.assert_close(found[module], update)
    for update, other in zip(llama_cpp_reads(folder, "LLAMA", 2).values(), expected.values(), strict=True):
        torch.testing.assert_close(update, other)


def test_ranks_that_differ(tmp_path: Path) -> None:
    """vLLM reads them, since every layer's scaling is 1; llama.cpp keeps one alpha and would scale some wrongly."""
    config = PsoftConfig(r=12, rank_pattern={"q_proj": 5}, target_modules=["q_proj", "v_proj"])
    folder = exported(tmp_path, config)
    found = obstacles(folder)
    assert found["vLLM"] == []
    assert len(vllm_reads(folder, 16)) == 4
    (reason,) = found["llama.cpp"]
    assert "--uniform-rank" in reason
    assert "llama.cpp: no: one alpha" in describe_obstacles(folder)


def test_what_is_more_than_factors_is_named(tmp_path: Path) -> None:
    config = PsoftConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(tiny_bert(), config)
    export_lora(model, tmp_path / "lora")
    found = obstacles(tmp_path / "lora")
    assert "classifier" in found["vLLM"][0]
    assert any("modules_to_save must be null" in reason for reason in found["vLLM"])
    assert "classifier" in found["llama.cpp"][0]
    folder = exported(tmp_path / "bias", PsoftConfig(r=4, target_modules=["q_proj"], bias="isotune_only"), "opt")
    assert "q_proj.base_layer.bias" in obstacles(folder)["vLLM"][0]
    assert "bias must be 'none'" in obstacles(folder)["vLLM"][1]


def test_folders_of_others(tmp_path: Path) -> None:
    """A LoRA folder that PEFT wrote is judged by the same rules."""
    up, down = torch.randn(6, 600), torch.randn(600, 6)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["a"], "use_dora": True, "alpha_pattern": {"a": 16}}
    LoraConfig(**options).save_pretrained(str(tmp_path))
    name = "base_model.model.a.lora_{}.weight"
    save_file({name.format("A"): down, name.format("B"): up}, tmp_path / "adapter_model.safetensors")
    reasons = obstacles(tmp_path)["vLLM"]
    for part in ("DoRA", "above 512", "above r=4", "alpha_pattern"):
        assert any(part in reason for reason in reasons), part
    get_peft_model(tiny_llama(), PsoftConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "own"))
    assert "ISOTUNE_PSOFT" in obstacles(tmp_path / "own")["vLLM"][0]


def test_the_next_rank_that_vllm_has() -> None:
    assert [vllm_max_rank(rank) for rank in (1, 2, 8, 46, 257, 512)] == [1, 8, 8, 64, 320, 512]
    assert vllm_max_rank(513) is None
