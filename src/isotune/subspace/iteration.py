"""The solver "lowrank": subspace iteration on a block of vectors, filtered by Chebyshev polynomials."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isotune.subspace.bounds import angle_bound, filter_degree, missing_energy, relative_residual
from isotune.subspace.pinning import gaussian
from isotune.subspace.precision import exact_product, full_precision, spares_float64

ENERGY_TOLERANCE = 1e-5
"""How far from optimal the captured energy may be if the gap at the cut is too small to determine the subspace."""

_MAX_APPLICATIONS = 60
# Rounds in bfloat16 end at this sine of the angle, which its rounding can reach with a margin.
_COARSE_ANGLE = 0.3
# Below this many multiplications per product, converting the weight costs more than the products save.
_COARSE_WORK = 2e8
# The number of squares added up in float32 where float64 is spared; their sums are added in float64.
_ROWS = 1024


def block_size(rank: int) -> int:
    """The number of vectors that "lowrank" iterates on: about twice the rank, so that the cut never limits the speed.

    It is a multiple of 16, for which matrix products at 4096 × 4096 took 7 % less time on two cores.
    """
    return -(-(2 * rank + 8) // 16) * 16


def iterate(
    matrix: Tensor, rank: int, tolerance: float, seed: int, weight: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """Chebyshev-filtered subspace iteration with Rayleigh-Ritz; None if the tolerance is not reached within the budget.

    Each round multiplies a block of about 2 · rank vectors by a Chebyshev polynomial of WᵀW that is small on the
    unwanted end of the spectrum, [0, θ_b], and grows fastest beyond it; this needs 2 to 4 times fewer products than
    powers.

    If the device multiplies bfloat16 much faster, the first rounds use it: a rounded product only gives the next round
    a slightly worse start. The residuals that decide are always those of a round in full precision.

    If float64 is slow (`spares_float64`), only block × block matrices use it. A round then waits for the device twice:
    for the eigenvalues and for the residuals.

    Args:
        matrix: W in float32 or float64, scaled.
        rank, tolerance, seed: as in `principal_subspace`.
        weight: W as it was given, if it has the same values as `matrix`, else `matrix`; 16-bit values save work.

    Returns:
        The basis (rank, in) and the singular values (rank,), and the number of products with WᵀW.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix  # iterate on the short side; the last product gives the long side
    short = tall.shape[1]
    block = min(short, block_size(rank))
    energy_tolerance = min(ENERGY_TOLERANCE, 10.0 * tolerance**2)
    single = matrix.dtype == torch.float32 and spares_float64(matrix.device)
    narrow = weight.element_size() <= 2
    high = torch.float32 if single else torch.float64
    full = tall if single else full_precision(tall)
    coarse = _rounds_cheaply(tall, block)
    working = (weight.T if wide else weight).to(torch.bfloat16) if coarse else full
    start = gaussian(short, block, seed).to(tall.dtype).to(tall.device)
    vectors = torch.linalg.qr(_product(working.T, _product(working, start, narrow), narrow)).Q
    applications = 1
    relative = math.inf
    while True:
        image = _product(working, vectors, narrow)
        values, rotation = torch.linalg.eigh(_gram(image, high))
        values = values.flip(0).clamp_min(0.0)
        # In float64 or in parts, like all products but those with the weight, so that no global setting rounds them.
        rotation = rotation.flip(1).to(high)
        vectors, image = (exact_product(part.to(high), rotation).to(tall.dtype) for part in (vectors, image))
        applied = _product(working.T, image, narrow)
        applications += 1
        errors = torch.linalg.vector_norm(applied.to(high) - vectors.to(high) * values.to(high), dim=0)
        ritz, residuals = torch.stack([values, errors.double()]).cpu()
        previous, relative = relative, relative_residual(ritz, residuals, rank)
        if coarse:
            # Rounds in bfloat16 stop gaining at its rounding error.
            if relative > 0.5 * previous or angle_bound(ritz, residuals, rank) <= _COARSE_ANGLE:
                coarse, working = False, full
                relative = math.inf
        else:
            # If residuals have fallen to rounding and no further, no more can be known about a cut between such close
            # values, and the energy decides. Residuals that merely fall slowly (a flat spectrum) prove nothing, since
            # larger eigenvalues may still be missing; these cases use up the budget and go to the exact solver.
            rounding = 32.0 * torch.finfo(matrix.dtype).eps * math.sqrt(rank * float(ritz[0] / ritz[rank - 1]))
            at_rounding = 0.5 * previous < relative <= rounding
            at_rounding = at_rounding and missing_energy(ritz, residuals, rank) <= energy_tolerance
            if block == short or at_rounding or angle_bound(ritz, residuals, rank) <= tolerance:
                top = (image if wide else vectors)[:, :rank].to(high)
                return (torch.linalg.qr(top).Q.T, values[:rank].sqrt()), applications
        if applications >= _MAX_APPLICATIONS:
            return None, applications
        cut = max(float(ritz[-1]), 1e-12 * float(ritz[0]))
        degree = filter_degree(float(ritz[0]) / cut, float(ritz[rank - 1]) / cut)
        before, vectors = vectors, applied * (2.0 / cut) - vectors
        for _ in range(degree - 1):
            applied = _product(working.T, _product(working, vectors, narrow), narrow)
            before, vectors = vectors, applied * (4.0 / cut) - 2.0 * vectors - before
        applications += degree - 1
        vectors = torch.linalg.qr(vectors).Q


def _rounds_cheaply(matrix: Tensor, block: int) -> bool:
    """Whether products in bfloat16 are several times faster here than in the dtype of `matrix`."""
    if matrix.dtype != torch.float32 or matrix.numel() * block < _COARSE_WORK:
        return False
    if matrix.device.type == "cpu":
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.6 has none
        return bool(can.get("amx_bf16", False) or can.get("avx512_bf16", False))
    return matrix.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _product(matrix: Tensor, block: Tensor, narrow: bool) -> Tensor:
    """`matrix` @ `block` in the precision of `matrix`, in the dtype of `block`; `narrow` as in `exact_product`."""
    return exact_product(matrix, block.to(matrix.dtype), narrow=narrow).to(block.dtype)


def _gram(block: Tensor, high: torch.dtype) -> Tensor:
    """blockᵀ block in float64, from products in `high`."""
    if high == torch.float64:
        return block.to(high).T @ block.to(high)
    total = torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64, device=block.device)
    for part in torch.split(block, _ROWS):
        total += exact_product(part.T, part)
    return total
