"""One training step of isotune's methods beside PEFT's, in one process.

Models like Llama, random weights, one step = forward, loss, backward. Variants are interleaved round by round, so that
whatever else the machine does falls on all of them, in another order each round, so that none always comes after the
same one (what comes after a variant that has emptied the caches is slower); medians over rounds are compared. Every
figure of time is a ratio to PEFT LoRA r=8 of the same round. "kept" counts, exactly, the bytes that the forward pass
saves for backward, frozen weights and adapter buffers not included. "aten" is the number of operations, views not
counted, that one adapted layer adds to a forward pass of a frozen one plus its own; "bound" is the ratio that the
multiplications alone would set: the frozen model's time and the update's products at the frozen model's own speed.

    python benchmarks/step.py                 # the table of the README
    python benchmarks/step.py --set family --width 512 --tokens 256 --dtype float32 --rounds 15
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import isotune
from isotune.experiments.measure import kept_bytes
from isotune.internals.operations import Operations

LAYERS = {256: 6, 512: 6, 1024: 4, 2048: 2}
RANKS = (46, 128)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REFERENCE = "PEFT LoRA r=8"
SETS = {
    "psoft": "PSOFT beside PEFT's",
    "family": "OFT, BOFT, GOFT and HRA beside PEFT's",
    "growth": "the same with smaller and larger blocks, chains and numbers of reflections",
}


def llama(width: int, dtype: torch.dtype) -> LlamaModel:
    """A random Llama of this width, with Llama's own ratio of the MLP's width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(width * 8 / 3) // 32 * 32,
        num_hidden_layers=LAYERS[width],
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=256,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaModel(config).to(dtype).train()


def variants(ranks: tuple[int, ...], which: str) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Name -> what makes the adapted model from a frozen one, for one of SETS."""

    def frozen(model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)

    def adapted(config: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: peft.get_peft_model(model, config, autocast_adapter_dtype=True)

    result: dict[str, Callable[[nn.Module], nn.Module]] = {
        "frozen": frozen,
        REFERENCE: adapted(peft.LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS)),
    }
    targets: dict[str, Any] = {"target_modules": PROJECTIONS}
    if which == "growth":
        for size in (8, 16, 32):
            result[f"isotune OFT b={size}"] = adapted(isotune.OFTConfig(oft_block_size=size, **targets))
        for factors in (1, 2, 3, 4):
            butterfly = {"boft_block_size": 4, "boft_n_butterfly_factor": factors, **targets}
            result[f"isotune BOFT m={factors} b=4"] = adapted(isotune.BOFTConfig(**butterfly))
        result["isotune GOFT"] = adapted(isotune.GOFTConfig(**targets))
        for count in (2, 8, 32):
            result[f"isotune HRA r={count}"] = adapted(isotune.HRAConfig(r=count, **targets))
        return result
    if which == "family":
        result["PEFT OFT b=32 exact"] = adapted(peft.OFTConfig(oft_block_size=32, use_cayley_neumann=False, **targets))
        result["PEFT OFT b=32 Neumann"] = adapted(peft.OFTConfig(oft_block_size=32, use_cayley_neumann=True, **targets))
        result["isotune OFT b=32 exact"] = adapted(isotune.OFTConfig(oft_block_size=32, **targets))
        result["PEFT HRA r=8"] = adapted(peft.HRAConfig(r=8, **targets))
        result["isotune HRA r=8"] = adapted(isotune.HRAConfig(r=8, **targets))
        for factors, size in ((2, 8), (4, 4)):
            options = {"boft_block_size": size, "boft_n_butterfly_factor": factors, **targets}
            # PEFT silently takes m=1 where its CUDA extension is not there.
            result[f"PEFT BOFT m={factors} b={size}"] = adapted(peft.BOFTConfig(**options))
            result[f"isotune BOFT m={factors} b={size}"] = adapted(isotune.BOFTConfig(**options))
        result["isotune GOFT"] = adapted(isotune.GOFTConfig(**targets))
        result["isotune qGOFT"] = adapted(isotune.QGOFTConfig(**targets))
        return result
    for rank in ranks:
        options = {"r": rank, "target_modules": PROJECTIONS}
        # How the subspace was found does not change what a step costs, so the quickest way is taken.
        peers = {**options, "psoft_alpha": rank, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1}
        result[f"PEFT PSOFT r={rank} exact"] = adapted(peft.PsoftConfig(**peers))
        result[f"PEFT PSOFT r={rank} Neumann"] = adapted(peft.PsoftConfig(use_cayley_neumann=True, **peers))
        result[f"isotune PSOFT r={rank} exact"] = adapted(isotune.PsoftConfig(**options))
    return result


def loss(model: nn.Module, embeddings: Tensor) -> Tensor:
    """A number that depends on all outputs."""
    return model(inputs_embeds=embeddings).last_hidden_state.float().square().mean()


def step(model: nn.Module, embeddings: Tensor) -> None:
    """Forward, loss, backward; gradients are dropped as an optimiser's zero_grad would."""
    loss(model, embeddings).backward()
    for parameter in model.parameters():
        parameter.grad = None
    embeddings.grad = None


def forward_operations(model: nn.Module, embeddings: Tensor) -> int:
    """Aten operations, views not counted, in one forward pass."""
    with Operations() as operations:
        model(inputs_embeds=embeddings)
    return len(operations.names)


def matmul_bound(model: nn.Module, rank: int) -> float:
    """Multiplications of the adapted model over those of the frozen one, linear layers only, forward and backward."""
    frozen = extra = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            out_features, in_features = module.weight.shape
            frozen += 2 * out_features * in_features
            extra += 2 * rank * (in_features + min(in_features, out_features)) + 3 * rank * rank
    return (frozen + extra) / frozen


@dataclass
class Row:
    """What one variant measured."""

    name: str
    ratio: float
    milliseconds: float
    kept_mib: float
    aten_per_layer: float | None
    bound: float | None


def measure(
    width: int, tokens: int, dtype: torch.dtype, rounds: int, ranks: tuple[int, ...], which: str = "psoft"
) -> list[Row]:
    """All variants of one setting."""
    base = llama(width, dtype)
    embeddings = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    models: dict[str, nn.Module] = {}
    for name, make in variants(ranks, which).items():
        models[name] = make(copy.deepcopy(base))
    for model in models.values():
        # A trained-looking adapter: at exactly zero some kernels are faster than they will ever be again.
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 1e-3)
        step(model, embeddings)
        step(model, embeddings)
    times: dict[str, list[float]] = {name: [] for name in models}
    shuffled, order = random.Random(0), list(models)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            step(models[name], embeddings)
            times[name].append(time.perf_counter() - start)
    operations = {name: forward_operations(model, embeddings) for name, model in models.items()}
    adapted_layers = LAYERS[width] * len(PROJECTIONS)
    frozen_time = statistics.median(times["frozen"])
    reference_time = statistics.median(times[REFERENCE])
    rows = []
    for name, model in models.items():
        rank = next((r for r in ranks if f"PSOFT r={r} " in name), None)
        ratio = statistics.median(a / b for a, b in zip(times[name], times[REFERENCE], strict=True))
        rows.append(
            Row(
                name,
                ratio,
                1e3 * statistics.median(times[name]),
                kept_bytes(model, functools.partial(loss, model, embeddings)) / 2**20,
                # A frozen linear layer is one operation, which the adapted layer contains.
                None if name == "frozen" else (operations[name] - operations["frozen"]) / adapted_layers + 1,
                matmul_bound(base, rank) * frozen_time / reference_time if rank else None,
            )
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", choices=sorted(LAYERS), default=[512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, nargs="+", default=list(RANKS))
    parser.add_argument(
        "--set", choices=list(SETS), default="psoft", help="; ".join(f"{k}: {v}" for k, v in SETS.items())
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(
        f"torch {torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}, isotune "
        f"{isotune.__version__}, {platform.machine()}, {options.threads} threads, {options.rounds} rounds"
    )
    results: list[dict[str, Any]] = []
    for width in options.width:
        for dtype in options.dtype:
            for tokens in options.tokens:
                rows = measure(width, tokens, getattr(torch, dtype), options.rounds, tuple(options.rank), options.set)
                print(f"\nwidth {width}, {LAYERS[width]} layers, {tokens} tokens, {dtype}")
                print(f"{'':28s} {'step / LoRA':>11s} {'bound':>6s} {'ms':>8s} {'kept MiB':>9s} {'aten/layer':>10s}")
                for row in rows:
                    bound = "" if row.bound is None else f"{row.bound:.2f}"
                    aten = "" if row.aten_per_layer is None else f"{row.aten_per_layer:.1f}"
                    print(
                        f"{row.name:28s} {row.ratio:11.2f} {bound:>6s} {row.milliseconds:8.1f} {row.kept_mib:9.1f} "
                        f"{aten:>10s}"
                    )
                    results.append({"width": width, "tokens": tokens, "dtype": dtype, **vars(row)})
                sys.stdout.flush()
    if options.json:
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        partial.replace(options.json)


if __name__ == "__main__":
    main()
