"""Speed and accuracy of isotune's principal-subspace solvers against torch.linalg.svd, in one process.

    python benchmarks/subspace.py --sizes 1024 14336x4096 --ranks 64
    python benchmarks/subspace.py --device cuda --dtype bfloat16 --sizes 1024x4096 4096 14336x4096 --ranks 46 352 --fit

The weights have random orthogonal factors and singular values i^-0.5, so the true subspace is known, up to the rounding
of a narrow dtype. Times are medians over the repeats; the SVD of a size is timed once per repeat and shared by its
ranks. With --fit, the constants of `cheaper_solver` for this device, from the times of this run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from isotune.subspace.iteration import block_size
from isotune.subspace.solvers import cheaper_solver, principal_subspace


def size_of(text: str) -> tuple[int, int]:
    """(out, in) of a size such as 4096 or 14336x4096."""
    out, _, width = text.partition("x")
    return int(out), int(width or out)


def weight_like(out: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """A float32 weight (out, in), and all its right singular vectors."""
    generator = torch.Generator().manual_seed(0)
    short = min(out, width)
    left, right = (torch.linalg.qr(torch.randn(n, short, generator=generator).to(device)).Q for n in (out, width))
    return (left * torch.arange(1, short + 1, device=device) ** -0.5) @ right.T, right.T


def seconds(function: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def memory_beyond(function: Callable[[], object], device: str) -> str:
    """MiB that a call needs at most beyond what is there before; only CUDA keeps count."""
    if not device.startswith("cuda"):
        return "-"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


def sine(found: Tensor, true: Tensor) -> float:
    found, true = found.double(), true.double()
    return float(torch.linalg.matrix_norm(found - (found @ true.T) @ true, 2))


def fitted(features: list[list[float]], times: list[float]) -> str:
    """Constants that, times the features, give the times with the least relative error."""
    rows, taken = torch.tensor(features, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    scale = rows.abs().amax(0)
    relative = rows / scale / taken[:, None]
    found = torch.linalg.lstsq(relative, torch.ones(len(taken), 1, dtype=torch.float64), driver="gelsd").solution[:, 0]
    off = float((relative @ found - 1).abs().max())
    return f"{' '.join(f'{value:.2e}' for value in (found / scale).tolist())}, at most {off:.0%} off"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size_of, nargs="+", default=[(512, 512), (1024, 1024), (2048, 2048)])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--fit", action="store_true", help="print the constants of a cost model for this device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, median of {options.repeats}")
    head = f"{'seconds':>8} {'× svd':>7} {'sine':>8} {'energy':>8} {'MiB':>6} products"
    print(f"{'size':>11} {'rank':>4} {'solver':>8} {head}")
    features: dict[str, list[list[float]]] = {"full": [], "lowrank": []}
    times: dict[str, list[float]] = {"full": [], "lowrank": []}
    for out, width in options.sizes:
        exact, vectors = weight_like(out, width, options.device)
        weight = exact.to(getattr(torch, options.dtype))
        torch.linalg.svd(exact[:64], full_matrices=False)  # loads the library
        kept: list[Tensor] = []

        def svd(weight: Tensor = exact, kept: list[Tensor] = kept) -> None:
            kept[:] = [torch.linalg.svd(weight, full_matrices=False).Vh]

        base = seconds(svd, options.repeats, options.device)
        for rank in options.ranks:
            if rank > min(out, width):
                continue
            best = float((torch.arange(1, rank + 1, dtype=torch.float64) ** -1.0).sum())
            rows = [("svd", base, kept[0][:rank], "     -")]
            for solver in ("full", "lowrank"):

                def solve(solver: str = solver, weight: Tensor = weight, rank: int = rank) -> Tensor:
                    return principal_subspace(weight, rank, solver=solver, tolerance=options.tolerance).basis

                found = principal_subspace(weight, rank, solver=solver, tolerance=options.tolerance)
                note = f"{memory_beyond(solve, options.device):>6} {found.iterations}"
                note += " fell back" if found.solver != solver else ""
                rows.append((solver, seconds(solve, options.repeats, options.device), found.basis, note))
                short, long, block = min(out, width), max(out, width), block_size(rank)
                features[solver].append(
                    [short, short**3, long * short**2] if solver == "full" else [1, block, long * short * block]
                )
                times[solver].append(rows[-1][1])
            for solver, taken, basis, note in rows:
                captured = float(torch.linalg.vector_norm(exact.double() @ basis.double().T)) ** 2
                chosen = "*" if solver == cheaper_solver(out, width, rank, options.device) else " "
                print(
                    f"{f'{out}x{width}':>11} {rank:4d} {chosen}{solver:>7} {taken:8.3f} {base / taken:7.1f} "
                    f"{sine(basis, vectors[:rank]):8.1e} {1 - captured / best:8.1e} {note}",
                    flush=True,
                )
    print("* what solver='auto' takes; energy: the share of the best energy that is missed")
    if options.fit:
        print("seconds of full by short, short³, long·short²:", fitted(features["full"], times["full"]))
        print("seconds of lowrank by 1, block, long·short·block:", fitted(features["lowrank"], times["lowrank"]))


if __name__ == "__main__":
    main()
