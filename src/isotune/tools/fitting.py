"""The parameters of an adapter with which it comes nearest to a given change of one weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isotune.adapter.operator import Adapter
from isotune.algebra.cayley import orthogonal_difference
from isotune.algebra.diagonal import scaled_difference
from isotune.algebra.householder import reflections
from isotune.algebra.procrustes import generator_of, nearest_rotation, reflections_of
from isotune.methods.hra import HRAOperator
from isotune.methods.oft import OFTOperator
from isotune.methods.psoft import PsoftOperator
from isotune.subspace.solvers import principal_subspace

_STEPS = 300
"""Most iterations of the search by which the parameters are improved where they have no closed form."""
_EXACT = {
    "use_cayley_neumann": False,
    "coft": False,
    "psoft_orth": True,
    "ab_svd_init": "psoft_init",
    "apply_GS": False,
}


def check_fits(config: object) -> None:
    """Refuse options with which an adapter is no rotation, or none that has a nearest one here.

    Raises:
        ValueError: there is such an option; says what it has to be.
    """
    for name, needed in _EXACT.items():
        if (found := getattr(config, name, needed)) != needed:
            raise ValueError(
                f"{name}={found!r} cannot be extracted from a checkpoint; leave it at {needed!r}, of which the nearest "
                "adapter is known."
            )


@torch.no_grad()
def fit(adapter: Adapter, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The parameters with which the adapter on W comes nearest to W', in the Frobenius norm.

    OFT: the orthogonal Procrustes problem of each block, in closed form. PSOFT: the same in the principal subspace for
    R; with α or β, which have no closed form, all three are then improved together by L-BFGS, as are the directions of
    HRA, which start from the rotation that is nearest among those of the space of the r strongest right singular
    vectors of W' − W. So the result is the best there is for OFT and for PSOFT without α and β, and for others a local
    optimum, which is the adapter itself if W' was made by one.

    Args:
        adapter: the adapter of OFT, PSOFT or HRA, placed on W.
        weight: W, (out, in).
        target: W', (out, in).

    Returns:
        Parameter name -> value, float64.

    Source: Schönemann (1966) for Procrustes; Yang, Shi and Liu, Orthogonal Model Merging (arXiv 2602.05943), for taking
    a rotation out of a fine-tuned weight by it; Liu and Nocedal (1989) for L-BFGS. That blocks, the principal subspace
    and reflections are fitted each in its own way is isotune's.
    """
    weight, target = weight.double(), target.double()
    if isinstance(adapter, PsoftOperator):
        found = _fit_psoft(adapter, weight, target)
        return {**found, "generator": found["generator"] / adapter.cayley.scale}
    if adapter.side == "output":  # W' = M W is W'ᵀ = Wᵀ Mᵀ
        weight, target = weight.mT, target.mT
    if isinstance(adapter, OFTOperator):
        return {"generator": _fit_oft(adapter, weight, target) / adapter.cayley.scale}
    assert isinstance(adapter, HRAOperator)
    return _fit_hra(adapter, weight, target)


def _fit_oft(adapter: OFTOperator, weight: Tensor, target: Tensor) -> Tensor:
    """Q of W'ₖ ≈ Wₖ Rₖᵀ for the columns of each block; one for all of them if it is shared."""
    shape = (len(weight), adapter.blocks, adapter.block_size)
    cross = torch.einsum("okb,okc->kbc", target.reshape(shape), weight.reshape(shape))
    if len(adapter.generator) == 1:
        cross = cross.sum(0, keepdim=True)
    return generator_of(nearest_rotation(cross))


def _fit_psoft(adapter: PsoftOperator, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Q, α and β of (W' − W) Vᵀ / s + P ≈ P Mᵀ with Mᵀ = diag(β) Rᵀ diag(α); the rest of W' − W is out of reach."""
    down, up = adapter.factors(weight.dtype, weight.device)
    down, up = down[: adapter.size], up[:, : adapter.size]
    wanted = (target - weight) @ down.mT / adapter.scale + up
    found = {"generator": generator_of(nearest_rotation(wanted.mT @ up))}
    scales = [name for name in ("input_scale", "output_scale") if getattr(adapter, name) is not None]
    if not scales:
        return found
    cross, gram = wanted.mT @ up, up.mT @ up  # P need not be kept: ‖T − P Mᵀ‖² = ‖T‖² − 2⟨TᵀP, M⟩ + ⟨Mᵀ, PᵀP Mᵀ⟩
    ones = weight.new_ones(adapter.size)
    found |= dict.fromkeys(scales, ones)
    change = float((wanted - up).square().sum()) or 1.0

    def loss(values: Sequence[Tensor]) -> Tensor:
        own = dict(zip(found, values, strict=True))
        difference = orthogonal_difference(own["generator"], adapter.size)
        factors = (own.get(name, ones) for name in ("input_scale", "output_scale"))
        difference = scaled_difference(difference, *factors)
        # With M = I + D only what depends on D, which does not cancel for small ones.
        return ((difference @ gram * difference).sum() - 2 * ((cross - gram) * difference).sum()) / change

    return dict(zip(found, _improved(list(found.values()), loss), strict=True))


def _fit_hra(adapter: HRAOperator, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """W' ≈ W Mᵀ with M − I of rank r at most."""
    count, change = len(adapter.vectors), target - weight
    rank = min(count, *change.shape)
    norm = float(change.square().sum()) or 1.0
    basis = principal_subspace(change, rank, name="the change of the weight").basis.double()
    rotation = nearest_rotation((target @ basis.mT).mT @ (weight @ basis.mT))
    directions = reflections_of(generator_of(rotation), count)[0] @ basis

    def loss(values: Sequence[Tensor]) -> Tensor:
        left, right = reflections(values[0])
        # ‖W' − W Mᵀ‖² − ‖W' − W‖² = −2⟨W', W Dᵀ⟩ + 2⟨W, W Dᵀ⟩ + ‖W Dᵀ‖² with M = I + D = I + left · right
        inner = weight @ right.mT
        moved = inner @ left.mT
        return (moved.square().sum() - 2 * (change * moved).sum()) / norm

    return {"vectors": _improved([directions], loss)[0]}


def _improved(start: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor]) -> list[Tensor]:
    """Values with a lower loss, found by L-BFGS from these; these themselves if it finds none."""
    values = [value.clone().requires_grad_() for value in start]
    search = torch.optim.LBFGS(
        values,
        max_iter=_STEPS,
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with torch.enable_grad():
            value = loss(values)
        for parameter, gradient in zip(values, torch.autograd.grad(value, values), strict=True):
            parameter.grad = gradient
        return value.detach()

    search.step(closure)  # type: ignore[no-untyped-call]
    found = [value.detach() for value in values]
    return found if bool(loss(found) <= loss(start)) else list(start)
