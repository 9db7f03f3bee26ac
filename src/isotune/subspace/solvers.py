"""The principal subspace of a weight: its top right singular vectors, exactly or to a stated tolerance."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from isotune.progress import bar
from isotune.subspace.cache import SubspaceCache
from isotune.subspace.equality import EqualWeights
from isotune.subspace.iteration import block_size, iterate
from isotune.subspace.pinning import gaussian
from isotune.subspace.precision import gram_by_rows, rows_in_parts, without_autocast
from isotune.subspace.result import Subspace, SubspaceRequest

SOLVERS = ("auto", "full", "lowrank")
SOLVER_VERSION = 2
"""Part of every cache key: raise it whenever a solver's result changes by more than rounding."""

# Singular values below this share of the largest are rounding noise of the weight itself: their directions are
# arbitrary, so they are replaced by directions that depend only on the others (see `_complete`).
_NEGLIGIBLE = {torch.float32: 2e-6, torch.float64: 1e-13}
_LARGEST_FULL = 2048
"""The largest shorter side at which "auto" may choose the exact solver on a GPU for its speed."""


def principal_subspace(
    weight: Tensor,
    rank: int,
    *,
    solver: str = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    name: str = "weight",
) -> Subspace:
    """Find the leading right singular vectors of a weight.

    The result is deterministic: it depends neither on the global random state nor on the process's settings nor, up to
    rounding, on the number of threads. Directions whose singular values are rounding noise (in a rank-deficient or zero
    weight) are filled in by a fixed rule that depends only on the directions above them, so that they are the same
    everywhere too.

    Args:
        weight: W, (out, in), of any floating dtype, layout and device.
        rank: r, from 1 to min(out, in).
        solver: "full" is exact. "lowrank" iterates until the sine of the largest angle to the true subspace is at most
            `tolerance`; or, if the singular values at the cut are too close for single precision to separate, until
            the captured energy is within min(1e-5, 10 `tolerance`²) of the largest possible; if it reaches neither, it
            computes the exact answer. "auto" takes the cheaper one for this shape, rank and device.
        tolerance: the sine of an angle, in (0, 1).
        seed: seed of the fixed Gaussian block from which "lowrank" starts.
        name: begins every error message.

    Returns:
        The basis, (r, in), with the singular values and the captured energy.

    Raises:
        ValueError: the weight is not a finite, real floating matrix, or an argument is not allowed.

    Examples:
        >>> import torch
        >>> found = principal_subspace(torch.diag(torch.tensor([1.0, 3.0, 2.0])), rank=2)
        >>> found.singular_values
        tensor([3., 2.])
        >>> found.basis.abs()
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
        >>> round(found.energy, 4)
        0.9286

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 8.6; Zhou, Saad, Tiago and Chelikowsky,
    "Self-consistent-field calculations using Chebyshev-filtered subspace iteration" (2006), algorithm 4.1.
    """
    _check_request(weight, rank, solver, tolerance, name)
    device = weight.device
    with torch.no_grad(), without_autocast(device):
        matrix = weight.detach()
        if device.type == "mps":
            matrix = matrix.cpu()  # no float64 there, and every small matrix below is float64
        matrix = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        lowest, highest = torch.aminmax(matrix)  # one pass, and no copy of a large weight
        largest = float(torch.maximum(-lowest, highest))
        if not math.isfinite(largest):
            raise ValueError(
                f"{name}: the weight holds NaN or infinity, but a principal subspace needs finite numbers; "
                f"check how the base model was loaded"
            )
        # Scaling by a power of two costs no accuracy, and prevents overflow and underflow of squares.
        exponent = math.frexp(largest)[1]
        scaled = abs(exponent) > 16
        if scaled:
            matrix = torch.ldexp(matrix, matrix.new_tensor(-exponent))  # 2 to an integer is in the default dtype
        original = matrix if scaled or device.type == "mps" else weight.detach()
        result = _solve(matrix, rank, solver, tolerance, seed, original)
        values = result.singular_values
        if scaled:
            values = torch.ldexp(values, values.new_tensor(exponent))
        return replace(result, basis=result.basis.to(device), singular_values=values.to(device))


def subspace_at(weight: Tensor, places: Iterable[int], *, name: str = "weight") -> Subspace:
    """Find right singular vectors of a weight by their places in the order of descending singular values.

    Args:
        weight, name: as in `principal_subspace`.
        places: ascending, from 0 to min(out, in) − 1.

    Returns:
        The exact vectors, (r, in), with their singular values and their share of ‖W‖²_F.

    Raises:
        ValueError: as in `principal_subspace`.
    """
    # The solver refuses a weight that is no matrix at all, with the reason.
    every = principal_subspace(weight, min(weight.shape, default=1) or 1, solver="full", name=name)
    index = torch.tensor(list(places), device=every.basis.device)
    values, squares = every.singular_values[index], every.singular_values.double().square()
    share = float(squares[index].sum() / squares.sum()) if bool(squares.any()) else 1.0
    return replace(every, basis=every.basis[index], singular_values=values, energy=share)


def principal_subspaces(
    requests: Sequence[SubspaceRequest],
    *,
    solver: str = "auto",
    tolerance: float = 1e-3,
    cache: SubspaceCache | None = None,
    progress: bool | None = None,
) -> list[Subspace]:
    """Find the principal subspaces of many weights, solving equal weights once.

    `solver` and `tolerance` are as in `principal_subspace`.

    Args:
        requests: the weights and their ranks.
        cache: keeps results on disk between processes; None turns it off. Weights on a CUDA device are always solved,
            which takes less time than finding their cache entry.
        progress: None shows one progress bar over all weights if the work takes more than a few seconds, True shows it
            at once, False never.

    Returns:
        One subspace per request, in order. Requests with equal ranks and equal weights on the same device get the same
        object.

    Raises:
        ValueError: as in `principal_subspace`, beginning with the request's name.
    """
    solved = EqualWeights()
    results: list[Subspace] = []
    with bar(total=len(requests), desc="principal subspaces", unit="weight", shown=progress) as shown:
        for request in requests:
            weight = request.weight if isinstance(request.weight, Tensor) else request.weight()
            _check_request(weight, request.rank, solver, tolerance, request.name)
            results.append(solved.subspace(weight, request, partial(_found_or_solved, solver, tolerance, cache)))
            del weight
            shown.update()
    return results


def _found_or_solved(
    solver: str, tolerance: float, cache: SubspaceCache | None, weight: Tensor, request: SubspaceRequest
) -> Subspace:
    key, full = "", request.places is not None  # a full decomposition takes longer than hashing, on a GPU too
    if cache is not None and cache.directory is not None and (full or worth_hashing(weight.device)):
        how = solver if request.places is None else f"full {request.places}"
        key = subspace_key(weight, request.rank, how, tolerance)
        found = cache.get(key, (request.rank, weight.shape[1]), weight=weight, tolerance=tolerance)
        if found is not None:
            return found
    if request.places is None:
        rank, name = request.rank, request.name
        found = principal_subspace(weight, rank, solver=solver, tolerance=tolerance, name=name)
    else:
        found = subspace_at(weight, request.places, name=request.name)
    if cache is not None and key:
        cache.put(key, found)
    return found


def worth_hashing(device: torch.device) -> bool:
    """Whether computing a weight's cache key costs less than solving it.

    It does not on a GPU: an H100's host took 0.1 to 0.4 s to copy and hash weights of 4096 × 4096 to 14336 × 4096,
    which the GPU solves in 0.02 to 0.04 s at rank 46 and in 0.12 s at rank 352.
    """
    return device.type != "cuda"


def subspace_key(weight: Tensor, rank: int, solver: str, tolerance: float) -> str:
    """The cache key of a principal subspace, made from everything it depends on, including `SOLVER_VERSION`.

    `rank`, `solver` and `tolerance` are as in `principal_subspace`.

    Args:
        weight: W, of which the shape, the dtype and the bytes in row-major order count.

    Returns:
        64 hexadecimal digits (blake2b).
    """
    digest = hashlib.blake2b(digest_size=32)
    settings = (SOLVER_VERSION, tuple(weight.shape), str(weight.dtype), rank, solver, float(tolerance))
    digest.update(repr(settings).encode())
    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_request(weight: Tensor, rank: int, solver: str, tolerance: float, name: str) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
        given = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"{name}: got {given}, but a principal subspace needs a non-empty matrix (out, in); reshape the weight "
            f"to two dimensions first"
        )
    if not weight.is_floating_point() or weight.is_meta:
        given = "a meta tensor without data" if weight.is_meta else f"dtype {weight.dtype}"
        raise ValueError(
            f"{name}: got {given}, but a principal subspace needs real floating numbers; load or dequantise the "
            f"weight first"
        )
    allowed = min(weight.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= allowed:
        raise ValueError(
            f"{name}: rank is {rank!r}, but a weight of shape {tuple(weight.shape)} allows integers from 1 to "
            f"{allowed}; choose a smaller rank, or leave this layer out"
        )
    if solver not in SOLVERS:
        raise ValueError(f"{name}: solver is {solver!r}; choose one of {', '.join(map(repr, SOLVERS))}")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(
            f"{name}: tolerance is {tolerance!r}; it is the sine of an angle, so give a number between 0 and 1, such "
            f"as 1e-3"
        )


def _solve(matrix: Tensor, rank: int, solver: str, tolerance: float, seed: int, original: Tensor) -> Subspace:
    # By rows: as accurate as float64 throughout, without converting a large weight.
    total = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    if solver == "auto":
        solver = cheaper_solver(matrix.shape[0], matrix.shape[1], rank, matrix.device)
    iterations = 0
    found = None
    if total > 0.0 and solver == "lowrank":
        found, iterations = iterate(matrix, rank, tolerance, seed, original)
    if found is None:
        solver = "full"
        found = _full(matrix, rank)
    basis, values = found
    basis = _complete(basis, values, _NEGLIGIBLE[matrix.dtype])
    energy = min(1.0, float(values.square().sum()) / total) if total > 0.0 else 1.0
    basis = basis.to(matrix.dtype).contiguous()
    return Subspace(basis, values.to(matrix.dtype), energy, solver, iterations)


def _full(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The exact top right singular vectors (rank, in) and values (rank,), in float64.

    For single precision: eigenvectors of the smaller Gram matrix in float64. Squaring costs half of float64's digits,
    which leaves more than single precision has: for weights with a condition number of 1e6, the result is closer to a
    float64 SVD than the float32 SVD is, and 1.2 to 1.6 times faster (benchmarks/subspace.py). For float64, which has
    no digits to spare, it is the SVD itself.
    """
    if matrix.dtype == torch.float64:
        _, values, basis = torch.linalg.svd(matrix, full_matrices=False)
        return basis[:rank], values[:rank]
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    eigenvalues, vectors = torch.linalg.eigh(gram_by_rows(tall))
    values = eigenvalues[-rank:].flip(0).clamp_min(0.0).sqrt()
    top = vectors[:, -rank:].flip(1)
    # QR removes the strong directions from the weak ones in turn; dividing by the singular value would not.
    parts = rows_in_parts(tall)  # so that there is never a whole float64 copy of a large weight
    return (torch.linalg.qr(torch.cat([part.double() @ top for part in parts])).Q.T if wide else top.T), values


def _complete(basis: Tensor, values: Tensor, negligible: float) -> Tensor:
    """Replace directions whose singular values are rounding noise by directions that are the same everywhere.

    These are a fixed Gaussian block, made orthogonal to the kept directions and to one another in order: they depend
    only on the span of the kept ones, whatever rank is requested.
    """
    rank, width = basis.shape
    kept = int((values > negligible * values[0]).sum())
    if kept == rank:
        return basis
    fill = gaussian(rank, width, 0)[: rank - kept].to(basis)
    orthogonal, triangular = torch.linalg.qr(torch.cat([basis[:kept], fill]).T)
    signs = torch.where(torch.diagonal(triangular) < 0, -1.0, 1.0).to(basis)
    return torch.cat([basis[:kept], (orthogonal * signs).T[kept:]])


def cheaper_solver(out_features: int, in_features: int, rank: int, device: torch.device | str = "cpu") -> str:
    """The solver that "auto" takes, "full" or "lowrank", by the cost model of a device.

    The models were fitted with benchmarks/subspace.py: operations on two CPU cores, and seconds on an NVIDIA H100 for
    bfloat16 weights of 1024 to 14336 rows and columns at ranks 46 and 352 (within 20 % of each measurement). Consumer
    GPUs have at most a fiftieth of that card's float64 speed, in which "full" squares the weight, so on a GPU "full" is
    limited to sides of 2048, unless the block of "lowrank" would be most of the weight.
    """
    short, long = sorted((out_features, in_features))
    block = block_size(rank)
    if 2 * block > short:
        return "full"
    if torch.device(device).type == "cuda":
        if short > _LARGEST_FULL:
            return "lowrank"
        full = 1.2e-5 * short + 1.1e-12 * short**3 + 4.3e-14 * long * short**2
        lowrank = 1.2e-2 + 6.4e-5 * block + 1.5e-12 * long * short * block
    else:
        full = 2.0 * long * short**2 + 12.0 * short**3
        lowrank = 20 * 4.0 * long * short * block
    return "lowrank" if lowrank < full else "full"
