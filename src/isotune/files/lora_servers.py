"""What servers require of a LoRA folder, and why they would refuse one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from isotune.files.adapter import WEIGHTS_FILE, read_config
from isotune.methods.config import by_pattern
from isotune.tuner.state import KEY_PREFIX

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Allowed values of vLLM's --max-lora-rank (vllm.config.lora.MaxLoRARanks, 0.22 to 0.33)."""

_BOTH = ("vLLM", "llama.cpp")
_VLLM, _LLAMA_CPP = _BOTH[:1], _BOTH[1:]
_FACTOR = re.compile(rf"{re.escape(KEY_PREFIX)}(.+)\.lora_([AB])\.weight")


def vllm_max_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that a LoRA adapter's rank fits; None if it is above the largest.

    Examples:
        >>> vllm_max_rank(46), vllm_max_rank(1000)
        (64, None)
    """
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def obstacles(directory: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reasons why "vLLM" or "llama.cpp" would refuse a LoRA folder or compute something else.

    Args:
        directory: a folder written by `export_lora` or PEFT.

    Returns:
        Server -> reasons, each with what to do; an empty list if the server supports the folder.

    Raises:
        AdapterFileError: the folder holds no readable adapter.

    Source: for vLLM its vllm.lora.peft_helper.PEFTHelper, vllm.lora.utils.parse_fine_tuned_lora_name and
    vllm.config.lora; for llama.cpp convert_lora_to_gguf.py and get_scale in src/llama-adapter.h.
    """
    folder = Path(directory)
    config = read_config(folder)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    found = list(_refusals(config, shapes))
    return {server: [reason for servers, reason in found if server in servers] for server in _BOTH}


def _refusals(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Pairs of servers and a reason why they refuse a folder."""
    if config.get("peft_type") != "LORA":
        yield _BOTH, f"its type is {config.get('peft_type')!r}, and only LORA is supported; export it with --to lora"
    if config.get("use_dora"):
        yield _BOTH, "DoRA is not supported; merge it into the base model with PEFT"
    factors = {name: match for name in shapes if (match := _FACTOR.fullmatch(name))}
    others = sorted(name.removeprefix(KEY_PREFIX) for name in shapes.keys() - factors.keys())
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        yield (
            _BOTH,
            f"it holds more than LoRA factors ({shown}: saved modules, biases or embeddings); train without them, or "
            "export the merged model",
        )
    if config.get("modules_to_save"):
        yield _VLLM, "modules_to_save must be null; train without it, or export the merged model"
    if config.get("bias", "none") != "none":
        yield _VLLM, "bias must be 'none'; train without it, or export the merged model"
    ranks = {match[1]: shapes[name][0] for name, match in factors.items() if match[2] == "A"}
    if vllm_max_rank(max(ranks.values(), default=0)) is None:
        yield _VLLM, f"its rank is above {VLLM_RANKS[-1]}; export it with --rank {VLLM_RANKS[-1]} or less"
    rank = int(config.get("r") or 0)
    if any(own > rank for own in ranks.values()):
        yield (
            _VLLM,
            f"a layer's rank is above r={rank}, the only one every version reads; export it with --uniform-rank",
        )
    alpha, power = config.get("lora_alpha", rank), 0.5 if config.get("use_rslora") else 1
    patterns = config.get("alpha_pattern") or {}
    scales = {module: by_pattern(patterns, module, alpha) / own**power for module, own in ranks.items()}
    if any(scale != alpha / max(rank, 1) ** power for scale in scales.values()):
        yield (
            _VLLM,
            "layers are scaled differently, and not every version reads alpha_pattern; export it with --uniform-rank",
        )
    if any(scale != alpha / ranks[module] for module, scale in scales.items()):
        yield (
            _LLAMA_CPP,
            "one alpha is used for all layers and divided by each layer's own rank, which would scale some wrongly; "
            "export it with --uniform-rank",
        )


def describe_obstacles(directory: str | os.PathLike[str]) -> str:
    """One line per server: the command or option that serves the folder, or why it cannot; raises as `obstacles`."""
    room = vllm_max_rank(int(read_config(directory).get("r") or 1))
    served_by = {"vLLM": f"--enable-lora --max-lora-rank {room}", "llama.cpp": "convert_lora_to_gguf.py"}
    return "\n".join(
        f"{server}: {'no: ' + '; '.join(reasons) if reasons else served_by[server]}"
        for server, reasons in obstacles(directory).items()
    )
