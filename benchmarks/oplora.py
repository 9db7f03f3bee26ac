"""One training step of OPLoRA beside PEFT's LoRA and OSF, which also trains off the strongest directions, and PSOFT.

A model like Llama with random weights, as in `step.py`; one step = forward, loss, backward and AdamW. The variants are
interleaved round by round in one process, in another order each round; "step" is the median over rounds of the ratio to
PEFT LoRA r=8 of the same round. "kept" counts the bytes that the forward pass saves for backward, frozen weights and
adapter buffers not included. "frozen" is what the adapter holds beside the base's weights and is not trained: bases,
projectors, frozen factors. "optimiser" are AdamW's two moments, after a step. "start" is the time to add the adapter:
singular vectors are found once.

    python benchmarks/oplora.py
    python benchmarks/oplora.py --width 512 --tokens 256 --rounds 7
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import isotune
from isotune.experiments.measure import kept_bytes
from isotune.experiments.planning.formula import factor_bytes
from step import LAYERS, PROJECTIONS, REFERENCE, llama, loss


def variants() -> dict[str, Any]:
    """Name -> configuration."""
    targets: dict[str, Any] = {"target_modules": PROJECTIONS}
    own: dict[str, Any] = {**targets, "subspace_cache": False}
    found: dict[str, Any] = {f"PEFT LoRA r={r}": peft.LoraConfig(r=r, lora_alpha=2 * r, **targets) for r in (8, 32)} | {
        f"isotune OPLoRA r={r} k=16": isotune.OploraConfig(r=r, lora_alpha=2 * r, **own) for r in (8, 32)
    }
    found["isotune OPLoRA r=8 k=128"] = isotune.OploraConfig(r=8, lora_alpha=16, preserved_rank=128, **own)
    found["isotune PSOFT r=46"] = isotune.PsoftConfig(r=46, **own)
    found["PEFT OSF, half of the rank"] = peft.OSFConfig(**targets)
    assert REFERENCE in found
    return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer, embeddings: Tensor) -> None:
    """Forward, loss, backward and AdamW."""
    loss(model, embeddings).backward()
    optimizer.step()
    optimizer.zero_grad()
    embeddings.grad = None


def held(model: nn.Module, base: nn.Module) -> int:
    """Bytes of what is not trained and is not the base's."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if not t.requires_grad}
    everything = sum(t.nbytes for t in tensors.values()) - sum(t.nbytes for t in [*base.parameters(), *base.buffers()])
    stored = sum(b.nbytes for name, b in model.named_buffers() if "isotune_form" in name)
    return everything - stored + factor_bytes(model)  # isotune's factors are no buffers


def measure(width: int, tokens: int, rounds: int) -> None:
    """Measure all variants of one setting and print a table."""
    base = llama(width, torch.float32)
    embeddings = torch.randn(1, tokens, width, requires_grad=True)
    models: dict[str, nn.Module] = {}
    starts: dict[str, float] = {}
    for name, config in variants().items():
        copied, begun = copy.deepcopy(base), time.perf_counter()
        models[name] = peft.get_peft_model(copied, config)
        starts[name] = time.perf_counter() - begun
    steps: dict[str, Callable[[], None]] = {}
    rows: dict[str, tuple[int, float, float, float]] = {}
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        steps[name] = functools.partial(step, model, optimizer, embeddings)
        kept = kept_bytes(model, functools.partial(loss, model, embeddings))
        steps[name]()
        states = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
        rows[name] = sum(p.numel() for p in trained), kept, states, held(model, base)
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in models}
    shuffled, order = random.Random(0), list(models)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            begun = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begun)
    print(f"\nwidth {width}, {LAYERS[width]} layers, {tokens} tokens, float32; sizes in MiB")
    print("| | step / LoRA | ms | kept | trained parameters | optimiser | frozen | start s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (count, *sizes) in rows.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times[REFERENCE], strict=True))
        kept, states, frozen = (f"{size / 2**20:.1f}" for size in sizes)
        middle = 1e3 * statistics.median(times[name])
        print(
            f"| {name} | {ratio:.2f} | {middle:.0f} | {kept} | {count:,} | {states} | {frozen} | {starts[name]:.1f} |"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", choices=sorted(LAYERS), default=[512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, peft {peft.__version__}, isotune {isotune.__version__}, {platform.machine()}, "
        f"{options.threads} threads, {options.rounds} rounds"
    )
    for width in options.width:
        for tokens in options.tokens:
            measure(width, tokens, options.rounds)


if __name__ == "__main__":
    main()
