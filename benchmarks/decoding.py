"""Times of a block's linear layers with PSOFT on one token, in CUDA graphs: plain products beside the Triton kernels.

The seven layers of a Llama 3.1 8B block in bf16, on three blocks of weights of their own, so that each is read from the
GPU's memory. "frozen" is x Wᵀ alone by cuBLAS; "plain" adds x downᵀ, its product with M − I and the update as they are
without kernels; "kernels" is what decoding takes, with M − I in one of the factors; "tiles" varies how kernels divide
their work. Microseconds a block, medians of interleaved rounds.

    python benchmarks/decoding.py -o decoding.json
    TRITON_INTERPRET=1 python benchmarks/decoding.py --dry-run    # without a GPU
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isotune.algebra import decoding_kernels
from isotune.algebra.decoding_kernels import Tiling, linear_with_update

WIDTH, INNER, KEYS = 4096, 14336, 1024
SHAPES = [(WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (WIDTH, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
BLOCKS, REPEATS = 3, 10
TILES = {
    "DOWN": [Tiling(1, 2048, 8, 2), Tiling(1, 1024, 4, 2), Tiling(2, 1024, 8, 2)],
    "LAYER": [Tiling(8, 512, 4, 3), Tiling(16, 256, 4, 3), Tiling(2, 2048, 4, 1), Tiling(1, 4096, 4, 1)],
}


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of what each takes a block on a GPU; the time of the last round's start alone cannot be seen on a CPU."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _, (name, run) in itertools.product(range(rounds), actions.items()):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        for _ in range(REPEATS):
            run()
        after.record()
        after.synchronize()
        found[name].append(1e3 * before.elapsed_time(after) / REPEATS / BLOCKS)
    return {name: round(statistics.median(times), 2) for name, times in found.items()}


def frozen(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def plain(x: Tensor, weight: Tensor, difference: Tensor, down: Tensor, up: Tensor) -> Tensor:
    update = torch.mm(torch.mm(x, down.t()), difference)
    return torch.mm(x, weight.t()).addmm_(update, up.t())


def kernels(x: Tensor, weight: Tensor, difference: Tensor, down: Tensor, up: Tensor) -> Tensor:
    found = linear_with_update(x, weight, None, down, up)
    assert found is not None
    return found


def tiled(which: str, tiling: Tiling, *given: Tensor) -> Tensor:
    before = getattr(decoding_kernels, which)
    setattr(decoding_kernels, which, tiling)
    try:
        return kernels(*given)
    finally:
        setattr(decoding_kernels, which, before)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[48, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="each once, tiny, in Triton's interpreter on the CPU")
    parser.add_argument("-o", "--output", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    shapes = [(out // 64, inner // 64) for out, inner in SHAPES] if options.dry_run else SHAPES
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    variants: dict[str, Callable[..., Tensor]] = {"frozen": frozen, "plain": plain, "kernels": kernels}
    for which, tilings in TILES.items():
        variants |= {f"{which} {tiling}": partial(tiled, which, tiling) for tiling in tilings}
    results: dict[str, Any] = {"card": "none" if options.dry_run else torch.cuda.get_device_name()}
    for rank in options.rank:
        layers = [
            (make(1, n), make(out, n) * n**-0.5, make(rank, rank) * 0.1, make(rank, n) * n**-0.5, make(out, rank))
            for out, n in shapes * BLOCKS
        ]
        # What M − I was multiplied into is of the same size, and takes the same time.
        actions = {
            name: lambda run=run, layers=layers: [run(*layer) for layer in layers] for name, run in variants.items()
        }
        if options.dry_run:
            for run in actions.values():
                run()
            print(f"r = {rank}: {', '.join(actions)}")
            continue
        found = microseconds({name: captured(run) for name, run in actions.items()}, options.rounds)
        rows = {name: {"us": time, "ratio": round(time / found["frozen"], 4)} for name, time in found.items()}
        results[f"r={rank}"] = rows
        for name, row in rows.items():
            print(f"r = {rank}  {name:60}  {row['us']:8.2f} µs  {row['ratio']:.3f}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
