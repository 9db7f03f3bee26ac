"""Times of the Triton kernels of block rotations beside plain torch on a GPU.

Each row is x (tokens, n) rotated by blocks of size b. "copy" is x + x, which reads and writes x once: what a rotation
costs at least; a backward pass reads twice and writes once, which takes one and a half copies. "share" is what a kernel
moves in a second over what the copy moves. "host" is the time that the CPU takes to start the work. Medians over
rounds, in which the variants of one row follow each other in changing order; the GPU's second-level cache is
overwritten before each, as other layers would. The last table varies how the kernels divide their work.

    python benchmarks/block_kernels.py -o block_kernels.json
    TRITON_INTERPRET=1 python benchmarks/block_kernels.py --dry-run    # without a GPU
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from isotune.algebra import block_kernels
from isotune.algebra.factors import BlockDiagonal, Factor

CACHE = 128 * 2**20
"""Bytes written between two measurements, more than the second-level cache of a GPU holds."""


class Timer:
    """Medians of the microseconds that a device and its host take for each of several functions."""

    def __init__(self, device: str, rounds: int) -> None:
        self.gpu, self.rounds = device == "cuda", rounds
        self.flushed = torch.empty(CACHE if self.gpu else 1, dtype=torch.int8, device=device)

    def _once(self, run: Callable[[], Any]) -> tuple[float, float]:
        self.flushed.zero_()
        if not self.gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6, float("nan")
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # Long enough work for the host to be ahead of the device: then the events enclose the device's time alone.
        torch.cuda._sleep(1_000_000)
        before.record()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e3, host * 1e6

    def __call__(self, variants: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
        """Name -> device and host."""
        for run in variants.values():
            run()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        order, shuffled = list(variants), random.Random(0)
        for _ in range(self.rounds):
            shuffled.shuffle(order)
            for name in order:
                found[name].append(self._once(variants[name]))
        return {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}


class Twin(BlockDiagonal):
    """The factor as it is without kernels."""

    def kernels(self, blocks: Tensor, *rows: Tensor) -> Any:
        return None


def tensors(tokens: int, n: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, a gradient, and blocks as small as those of an adapter."""
    x, gradient = (torch.randn(tokens, n, device=device, dtype=dtype) for _ in range(2))
    return x, gradient, 0.05 * torch.randn(n // size, size, size, device=device, dtype=dtype)


def variants(x: Tensor, gradient: Tensor, blocks: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed on one shape."""
    size = blocks.shape[-1]
    twin: Factor = Twin(size)
    return {
        "copy": lambda: x + x,
        "forward torch": lambda: twin.apply(x, [blocks]),
        "forward kernel": lambda: block_kernels.rotate_blocks(x, blocks),
        "backward torch": lambda: twin.backward(x, gradient, [blocks], True),
        "backward kernel": lambda: block_kernels.rotate_blocks_backward(x, gradient, blocks, True),
        "blocks torch": lambda: twin.backward(x, gradient, [blocks], needs_x=False),
        "blocks kernel": lambda: block_kernels.rotate_blocks_backward(x, gradient, blocks, False),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, nargs="+", default=[4096, 14336])
    parser.add_argument("--size", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-tilings", action="store_true", help="leave out the last table")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter on the CPU")
    parser.add_argument("-o", "--output", type=Path, help="also write the figures here, after each row")
    options = parser.parse_args()
    device = "cuda"
    if options.dry_run:
        # The interpreter multiplies no bfloat16.
        device, options.tokens, options.width, options.dtype, options.rounds = "cpu", 40, [128], ["float32"], 2
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    timer = Timer(device, options.rounds)
    card = "none" if options.dry_run else torch.cuda.get_device_name()
    results: dict[str, Any] = {
        "card": card, "torch": torch.__version__, "triton": triton.__version__, "tokens": options.tokens,
        "times": [], "tilings": [],
    }  # fmt: skip
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}, {options.tokens} tokens; microseconds")

    def keep() -> None:
        if options.output:
            partial = options.output.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1))
            partial.replace(options.output)

    shapes = list(itertools.product(options.dtype, options.width, options.size))
    for dtype, n, size in shapes:
        x, gradient, blocks = tensors(options.tokens, n, size, getattr(torch, dtype), device)
        found = timer(variants(x, gradient, blocks))
        copy = found["copy"][0]
        print(f"\n{dtype} n={n} b={size}: copy {copy:.1f}")
        for way, passes in {"forward": 1.0, "backward": 1.5, "blocks": 1.0}.items():
            (plain, plain_host), (kernel, host) = found[f"{way} torch"], found[f"{way} kernel"]
            print(
                f"  {way:9s} torch {plain:7.1f} (host {plain_host:5.1f})   kernel {kernel:7.1f} (host {host:5.1f})   "
                f"{plain / kernel:5.2f} times as fast, share {passes * copy / kernel:.2f}",
                flush=True,
            )
        results["times"].append({"dtype": dtype, "n": n, "size": size, **found})
        keep()
    if options.no_tilings:
        return
    print("\nforward / backward by tiling")
    standard = block_kernels.FORWARD, block_kernels.BACKWARD, block_kernels.PROGRAMS
    tilings = [(64, 4, 3, 264)]
    if not options.dry_run:
        loops = [(2, 264), (3, 132), (3, 264), (3, 528), (4, 264)]
        tilings = [(rows, warps, *loop) for rows in (64, 128) for warps in (4, 8) for loop in loops]
    for n, (rows, warps, stages, programs) in itertools.product(options.width, tilings):
        dtype, size = options.dtype[0], 32
        x, gradient, blocks = tensors(options.tokens, n, size, getattr(torch, dtype), device)
        block_kernels.FORWARD = replace(standard[0], rows=rows, warps=warps)
        block_kernels.BACKWARD = replace(standard[1], rows=rows, warps=warps, stages=stages)
        block_kernels.PROGRAMS = programs
        try:
            chosen = variants(x, gradient, blocks)
            found = timer({name: chosen[name] for name in ("forward kernel", "backward kernel")})
        finally:
            block_kernels.FORWARD, block_kernels.BACKWARD, block_kernels.PROGRAMS = standard
        forward, backward = found["forward kernel"][0], found["backward kernel"][0]
        print(
            f"  {dtype} n={n} b={size} rows={rows} warps={warps} stages={stages} programs={programs}: "
            f"{forward:.1f} / {backward:.1f}",
            flush=True,
        )
        results["tilings"].append(
            {"dtype": dtype, "n": n, "size": size, "rows": rows, "warps": warps, "stages": stages,
             "programs": programs, "forward": forward, "backward": backward}
        )  # fmt: skip
        keep()


if __name__ == "__main__":
    main()
