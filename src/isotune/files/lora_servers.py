"""What servers need of a LoRA folder, and what in one stands against it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import safe_open

from isotune.files.adapter import WEIGHTS_FILE, read_config
from isotune.tuner.state import KEY_PREFIX

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vllm.config.lora.MaxLoRARanks, 0.22 to 0.33)."""

_FACTOR = re.compile(rf"{re.escape(KEY_PREFIX)}(.+)\.lora_[AB]\.weight")


def vllm_max_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that has room for a rank; None above the largest.

    Args:
        rank: of a LoRA adapter.

    Example:
        >>> vllm_max_rank(46), vllm_max_rank(1000)
        (64, None)
    """
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def obstacles(directory: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Why each of "vLLM" and "llama.cpp" would refuse a LoRA folder or compute something else; nothing if it serves.

    Args:
        directory: as `export_lora` or PEFT wrote it.

    Returns:
        Server -> reasons, each with what to do.

    Raises:
        AdapterFileError: there is no readable adapter.

    Source: for vLLM its vllm.lora.peft_helper.PEFTHelper, vllm.lora.utils.parse_fine_tuned_lora_name and
    vllm.config.lora; for llama.cpp convert_lora_to_gguf.py and get_scale in src/llama-adapter.h.
    """
    folder = Path(directory)
    config = read_config(folder)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    common = list(_refused_by_both(config, shapes))
    return {
        "vLLM": [*common, *_refused_by_vllm(config, shapes)],
        "llama.cpp": [*common, *_refused_by_llama_cpp(config, shapes)],
    }


def _refused_by_both(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"its type is {config.get('peft_type')!r}, and only LORA is read; export it with --to lora"
    if config.get("use_dora"):
        yield "DoRA is not read"
    others = sorted(name.removeprefix(KEY_PREFIX) for name in shapes if not _FACTOR.fullmatch(name))
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        yield (
            f"it holds more than LoRA factors ({shown}: saved modules, biases or embeddings); train without them, or "
            "export the merged model"
        )


def _refused_by_vllm(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    rank = int(config.get("r", 0))
    if config.get("modules_to_save"):
        yield "modules_to_save must be null; train without it, or export the merged model"
    if config.get("bias", "none") != "none":
        yield "bias must be 'none'; train without it, or export the merged model"
    if vllm_max_rank(max(_ranks(shapes).values(), default=0)) is None:
        yield f"its rank is above {VLLM_RANKS[-1]}; export it with --rank {VLLM_RANKS[-1]} or less"
    if any(own > rank for own in _ranks(shapes).values()):
        yield f"a layer's rank is above r={rank}, the only one that every version reads; export it with --uniform-rank"
    scale = _scale(config, config.get("lora_alpha", rank), rank)
    if any(_scale_of(config, module, own) != scale for module, own in _ranks(shapes).items()):
        yield "layers are scaled differently, and not every version reads alpha_pattern; export it with --uniform-rank"


def _refused_by_llama_cpp(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    alpha = float(config.get("lora_alpha", 0))
    if any(_scale_of(config, module, own) != alpha / own for module, own in _ranks(shapes).items()):
        yield (
            "one alpha is kept for all layers and divided by each layer's own rank, which would scale some wrongly; "
            "export it with --uniform-rank"
        )


def _ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Module -> rows of its A."""
    suffix = ".lora_A.weight"
    return {n.removeprefix(KEY_PREFIX).removesuffix(suffix): s[0] for n, s in shapes.items() if n.endswith(suffix)}


def _scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor that PEFT gives the update of a module."""
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    return _scale(config, patterns.get(get_pattern_key(list(patterns), module), config.get("lora_alpha", rank)), rank)


def _scale(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank) if rank else 0.0


def describe_obstacles(directory: str | os.PathLike[str]) -> str:
    """One line a server: with what it serves the folder, or why not.

    Args:
        directory: as `export_lora` or PEFT wrote it.

    Raises:
        AdapterFileError: as `obstacles`.
    """
    room = vllm_max_rank(int(read_config(directory).get("r", 1)))
    served_by = {"vLLM": f"--enable-lora --max-lora-rank {room}", "llama.cpp": "convert_lora_to_gguf.py"}
    lines = []
    for server, reasons in obstacles(directory).items():
        lines.append(f"{server}: {'no: ' + '; '.join(reasons) if reasons else served_by[server]}")
    return "\n".join(lines)
