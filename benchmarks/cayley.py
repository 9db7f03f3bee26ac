"""Ways to the Cayley transform of many skew-symmetric matrices on a GPU: time, kernels, errors, and CUDA graphs.

Each row is R − I of `count` matrices Q (n, n) in float32, without TF32. Times are medians over rounds, in which the
ways follow each other in changing order, at ‖Q‖₂ about 0.05; "host" is what the CPU takes to start the work. Errors are
of two matrices against float64, relative ones of R − I, and the largest entry of RᵀR − I. "graph" says whether a CUDA
graph can hold it; those of which it is least sure are tried last, for after one that fails, others may fail.

    python benchmarks/cayley.py -o cayley.json              # about 20 s
    python benchmarks/cayley.py --warps                     # also the kernels with other numbers of warps
    TRITON_INTERPRET=1 python benchmarks/cayley.py --dry-run    # without a GPU
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from block_kernels import Timer
from isotune.algebra import cayley, elimination_kernels

SHAPES = [(224, 46), (224, 128), (28, 256), (224, 256), (224, 352), (5000, 32), (40000, 32), (77824, 8)]
LOOKED_INTO = [(224, 46), (224, 128), (28, 256)]
"""Where kernels are counted and captures tried."""
NORMS = (0.05, 2.0)


def skew(count: int, n: int, norm: float, device: str) -> Tensor:
    """Random matrices of about this spectral norm."""
    matrix = torch.randn(count, n, n, device=device)
    return (matrix - matrix.mT).mul_(norm / (8 * n) ** 0.5).contiguous()


def minus(generator: Tensor) -> Tensor:
    """I − Q."""
    result = -generator
    result.diagonal(dim1=-2, dim2=-1).fill_(1)
    return result


def by_solve(generator: Tensor) -> Tensor:
    """(I − Q)⁻¹ 2Q."""
    return torch.linalg.solve_ex(minus(generator), 2 * generator)[0]


def by_inverse(generator: Tensor) -> Tensor:
    """The same by the inverse."""
    return 2 * torch.bmm(torch.linalg.inv_ex(minus(generator))[0], generator)


def by_cholesky(generator: Tensor) -> Tensor:
    """(I + QᵀQ)⁻¹ 2 (Q + Q²), as (I − Q)⁻¹ = (I + QᵀQ)⁻¹ (I + Q)."""
    square = torch.bmm(generator, generator)
    normal = -square
    normal.diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.cholesky_solve(2 * (generator + square), torch.linalg.cholesky_ex(normal)[0])


def by_newton(generator: Tensor, steps: int) -> Tensor:
    """By Newton–Schulz steps for the inverse, from the best multiple of (I − Q)ᵀ that the Frobenius norm tells."""
    matrix = minus(generator)
    # The squared singular values lie from 1 to 1 + ‖Q‖₂², and ‖Q‖₂² is at most half of ‖Q‖_F², for they come in pairs.
    inverse = matrix.mT * (2 / (2 + generator.square().sum((-2, -1), keepdim=True) / 2))
    for _ in range(steps):
        inverse = torch.baddbmm(inverse, inverse, torch.bmm(matrix, inverse), beta=2, alpha=-1)
    return 2 * torch.bmm(generator, inverse)


def by_halves(generator: Tensor, leaf: int) -> Tensor:
    """By inverting a quarter and the Schur complement of it, and so on until at most `leaf` rows are left."""

    def inverse(matrix: Tensor) -> Tensor:
        n = matrix.shape[-1]
        if n <= leaf:
            return torch.linalg.inv_ex(matrix)[0]
        half = n // 2
        upper, lower = matrix.split([half, n - half], -2)
        (a, b), (c, d) = (part.split([half, n - half], -1) for part in (upper, lower))
        first = inverse(a)
        right, down = torch.bmm(first, b), torch.bmm(c, first)
        last = inverse(torch.baddbmm(d, c, right, alpha=-1))
        below = torch.bmm(last, down)
        result = torch.empty_like(matrix)
        result[..., :half, :half] = torch.baddbmm(first, right, below)
        result[..., :half, half:] = -torch.bmm(right, last)
        result[..., half:, :half] = -below
        result[..., half:, half:] = last
        return result

    return 2 * torch.bmm(inverse(minus(generator)), generator)


# The surest to be captured first.
WAYS: dict[str, Callable[[Tensor], Any]] = {
    "kernel": elimination_kernels.cayley_by_elimination,
    "Newton 8": partial(by_newton, steps=8),
    "Newton 12": partial(by_newton, steps=12),
    "inverse": by_inverse,
    "halves 64": partial(by_halves, leaf=64),
    "halves 32": partial(by_halves, leaf=32),
    "solve": by_solve,
    "Cholesky": by_cholesky,
    "LU": cayley._solve,
}


def errors(way: Callable[[Tensor], Tensor], generator: Tensor) -> tuple[float, float]:
    """The relative error of R − I and the largest entry of RᵀR − I, of two matrices."""
    found, exact = way(generator)[:2].double(), by_solve(generator[:2].double())
    defect = found + found.mT + found.mT @ found
    return float((found - exact).norm() / exact.norm()), float(defect.abs().max())


def kernels_of(run: Callable[[], Any]) -> int:
    """How many kernels it starts, with copies and fills."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def captured(run: Callable[[], Any]) -> str:
    """Whether a CUDA graph holds it and gives the same, or why not."""
    try:
        expected = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        graph.replay()
        torch.cuda.synchronize()
        return "yes" if torch.allclose(found, expected, atol=1e-6) else "other numbers"
    except Exception as error:
        return f"no: {type(error).__name__} {str(error).splitlines()[0][:80]}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warps", action="store_true", help="also the kernels with other numbers of warps")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter on the CPU")
    parser.add_argument("-o", "--output", type=Path, help="also write the figures here, after each row")
    options = parser.parse_args()
    device, shapes, looked_into = ("cuda", SHAPES, LOOKED_INTO)
    if options.dry_run:
        device, shapes, looked_into, options.rounds = "cpu", [(3, 8), (2, 70)], [], 1
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    timer = Timer(device, options.rounds)
    results: dict[str, Any] = {
        "card": "none" if options.dry_run else torch.cuda.get_device_name(), "torch": torch.__version__, "rows": [],
    }  # fmt: skip

    def keep() -> None:
        if options.output:
            options.output.write_text(json.dumps(results, indent=1))

    generators: dict[tuple[int, int], Tensor] = {}
    for count, n in shapes:
        generator = skew(count, n, NORMS[0], device)
        if (count, n) in looked_into:
            generators[count, n] = generator
        larger = generator * (NORMS[1] / NORMS[0])
        measured: dict[str, Any] = {}
        for name, way in WAYS.items():
            try:
                measured[name] = {"errors": [errors(way, generator), errors(way, larger)]}
            except Exception as error:
                print(f"{name}: {type(error).__name__} {error}")
        times = timer({name: partial(WAYS[name], generator) for name in measured})
        print(f"\n{count} matrices of {n}: ms, host ms; error and defect at ‖Q‖ = {NORMS[0]}, {NORMS[1]}")
        for name, (gpu, host) in times.items():
            measured[name] |= {"ms": gpu / 1e3, "host": host / 1e3}
            (one, other), (two, four) = measured[name]["errors"]
            print(f"  {name:10s} {gpu / 1e3:8.3f} {host / 1e3:8.3f}   {one:.1e} {other:.1e}   {two:.1e} {four:.1e}")
        results["rows"].append({"count": count, "n": n, "ways": measured})
        keep()
    if options.warps:
        standard = elimination_kernels.WARPS, elimination_kernels.PRODUCT_WARPS
        for count, n in shapes:
            generator = skew(count, n, NORMS[0], device)
            for warps in (1, 2, 4, 8):
                if n > elimination_kernels.BLOCK and warps < 4:
                    continue
                elimination_kernels.WARPS = dict.fromkeys(standard[0], warps)
                elimination_kernels.PRODUCT_WARPS = warps
                try:
                    found = timer({"kernel": partial(WAYS["kernel"], generator)})["kernel"]
                finally:
                    elimination_kernels.WARPS, elimination_kernels.PRODUCT_WARPS = standard
                print(f"{count} matrices of {n}, {warps} warps: {found[0] / 1e3:.3f} ms", flush=True)
                results.setdefault("warps", []).append([count, n, warps, found[0] / 1e3])
                keep()
    # Nothing is timed after the profile, whose library slows launches.
    counts = {s: {name: kernels_of(partial(way, q)) for name, way in WAYS.items()} for s, q in generators.items()}
    for (count, n), found in counts.items():
        print(f"\n{count} matrices of {n}, kernels: {found}", flush=True)
        results.setdefault("kernels", []).append([count, n, found])
        keep()
    for name, way in WAYS.items():
        for (count, n), generator in generators.items():
            graph = captured(partial(way, generator))
            print(f"graph, {name}, {count} matrices of {n}: {graph}", flush=True)
            results.setdefault("graphs", []).append([name, count, n, graph])
            keep()


if __name__ == "__main__":
    main()
