"""Speed and accuracy of isotune's principal-subspace solvers against torch.linalg.svd, in one process.

    python benchmarks/subspace.py --sizes 1024 2048 --ranks 64

The weights have random orthogonal factors and singular values i^-0.5, so the true subspace is known. Times are medians
over the repeats; the SVD of a size is timed once per repeat and shared by its ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from isotune.subspace.solvers import cheaper_solver, principal_subspace


def weight_like(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return (left * torch.arange(1, size + 1) ** -0.5) @ right.T, right.T


def seconds(function: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def sine(found: Tensor, true: Tensor) -> float:
    found, true = found.double(), true.double()
    return float(torch.linalg.matrix_norm(found - (found @ true.T) @ true, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, median of {options.repeats}")
    print(f"{'size':>5} {'rank':>4} {'solver':>8} {'seconds':>8} {'× svd':>7} {'sine':>8} {'energy':>8} products")
    for size in options.sizes:
        weight, vectors = (tensor.to(options.device) for tensor in weight_like(size))
        torch.linalg.svd(weight[:64], full_matrices=False)  # loads the library
        kept: list[Tensor] = []

        def svd(weight: Tensor = weight, kept: list[Tensor] = kept) -> None:
            kept[:] = [torch.linalg.svd(weight, full_matrices=False).Vh]

        base = seconds(svd, options.repeats, options.device)
        for rank in options.ranks:
            if rank > size:
                continue
            best = float((torch.arange(1, rank + 1, dtype=torch.float64) ** -1.0).sum())
            rows = [("svd", base, kept[0][:rank], "")]
            for solver in ("full", "lowrank"):

                def solve(solver: str = solver, weight: Tensor = weight, rank: int = rank) -> Tensor:
                    return principal_subspace(weight, rank, solver=solver, tolerance=options.tolerance).basis

                found = principal_subspace(weight, rank, solver=solver, tolerance=options.tolerance)
                note = f"{found.iterations}" + (" fell back" if found.solver != solver else "")
                rows.append((solver, seconds(solve, options.repeats, options.device), found.basis, note))
            for solver, taken, basis, note in rows:
                captured = float(torch.linalg.vector_norm(weight.double() @ basis.double().T)) ** 2
                chosen = "*" if solver == cheaper_solver(size, size, rank) else " "
                print(
                    f"{size:5d} {rank:4d} {chosen}{solver:>7} {taken:8.3f} {base / taken:7.1f} "
                    f"{sine(basis, vectors[:rank]):8.1e} {1 - captured / best:8.1e} {note}",
                    flush=True,
                )
    print("* what solver='auto' takes; energy: the share of the best energy that is missed")


if __name__ == "__main__":
    main()
