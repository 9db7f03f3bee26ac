"""How much of a weight its leading directions hold, and sizes chosen by it: for a share of the energy, or a budget."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isotune.subspace.cache import SubspaceCache
from isotune.subspace.precision import gram_by_rows, without_autocast
from isotune.subspace.result import Subspace
from isotune.subspace.solvers import subspace_key, worth_hashing

_ROUNDING = 1e-9
"""By how much a share may miss the one that is asked for: sums of energies are rounded."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that one layer may have, ascending, with the parameters and the share of the energy of each."""

    sizes: Sequence[int]
    prices: Sequence[int]
    kept: Sequence[float]


@torch.no_grad()
def spectrum(weight: Tensor, *, cache: SubspaceCache | None = None, name: str = "weight") -> Tensor:
    """All singular values of a weight, descending, (min(out, in),), in float64 on the CPU.

    They are roots of the eigenvalues of the smaller Gram matrix, in float64; those below 1e-8 of the largest are noise.

    Args:
        weight: W, (out, in), of any floating dtype.
        cache: keeps results on disk between processes, as for subspaces.
        name: begins the error message.

    Raises:
        ValueError: the weight holds NaN or infinity.

    Examples:
        >>> spectrum(torch.diag(torch.tensor([1.0, 3.0, 2.0]))).tolist()
        [3.0, 2.0, 1.0]
    """
    count, key = min(weight.shape), ""
    if cache is not None and cache.directory is not None and worth_hashing(weight.device):
        key = subspace_key(weight, count, "spectrum", 0.0)
        if (found := cache.get(key, (count, 0))) is not None:
            return found.singular_values
    values: Tensor = torch.linalg.eigvalsh(_gram(weight, name)).flip(0).clamp_min(0.0).sqrt().cpu()
    if cache is not None and key:
        cache.put(key, Subspace(values.new_empty(count, 0), values, 1.0, "spectrum", 0))
    return values


@torch.no_grad()
def output_energies(weight: Tensor, moments: Tensor, *, name: str = "weight") -> Tensor:
    """The energy of the outputs W x along each left singular vector of W: E(uᵢᵀ W x)² = σᵢ² vᵢᵀ C vᵢ.

    They stand in the order of W's singular values, so that the first r are the energy that passes through the principal
    subspace of rank r; together they are E‖W x‖².

    Args:
        weight: W, (out, in).
        moments: C = E x xᵀ, (in, in), up to a factor, on the weight's device.
        name: begins the error message.

    Returns:
        The energies, (min(out, in),), in float64 on the CPU.

    Raises:
        ValueError: the weight or the moments hold NaN or infinity.
    """
    if not bool(torch.isfinite(moments).all()):
        raise ValueError(f"{name}: its inputs on the given data hold NaN or infinity; check the data and the model.")
    values, vectors = torch.linalg.eigh(_gram(weight, name))
    vectors, middle = vectors.flip(1), moments.double()
    if weight.shape[0] < weight.shape[1]:
        wide = weight.detach().double()
        found: Tensor = (vectors * (wide @ middle @ wide.mT @ vectors)).sum(0)
    else:
        found = values.flip(0) * (vectors * (middle @ vectors)).sum(0)
    return found.clamp_min(0.0).cpu()


def _gram(weight: Tensor, name: str) -> Tensor:
    """The smaller Gram matrix of a weight, in float64, refused if the weight is not finite."""
    tall = weight.detach() if weight.shape[0] >= weight.shape[1] else weight.detach().mT
    with without_autocast(tall.device):
        gram = gram_by_rows(tall)
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(f"{name}: the weight holds NaN or infinity; check how the base model was loaded.")
    return gram


@torch.no_grad()
def block_shares(
    width: int, sizes: Sequence[int], weight: Tensor | None = None, moments: Tensor | None = None
) -> list[float]:
    """The share of the effect of all small rotations of the inputs that those within blocks of each size have.

    A small rotation of the inputs i and j changes W x by W (eᵢ xⱼ − eⱼ xᵢ), of mean squared length
    Gᵢᵢ Cⱼⱼ + Gⱼⱼ Cᵢᵢ − 2 Gᵢⱼ Cᵢⱼ with G = WᵀW and C = E x xᵀ. It is summed over the pairs in blocks and divided by the
    sum over all pairs. With C = I the weight does not matter: the share is (b − 1) / (width − 1).

    Args:
        width: the number of inputs.
        sizes: block sizes b that divide it.
        weight: W, (out, width); needed with `moments`.
        moments: C, (width, width), up to a factor; None stands for the identity.
    """
    if moments is None or weight is None:
        return [(size - 1) / max(1, width - 1) for size in sizes]
    wide, inputs = weight.detach().double(), moments.double()
    gram = wide.mT @ wide
    own, power = gram.diagonal(), inputs.diagonal()
    planes = own.outer(power) + power.outer(own) - 2.0 * gram * inputs
    total = float(planes.sum())
    if total <= 0.0:
        return [1.0] * len(sizes)
    blocks = (planes.unfold(0, size, size).unfold(1, size, size).diagonal(dim1=0, dim2=1) for size in sizes)
    return [min(1.0, float(block.sum()) / total) for block in blocks]


def kept_shares(energies: Tensor) -> list[float]:
    """The share of all energy that the first 1, 2, … directions hold; 1 for each if there is none at all.

    Examples:
        >>> kept_shares(torch.tensor([6.0, 3.0, 1.0]))
        [0.6, 0.9, 1.0]
    """
    total = float(energies.double().sum())
    if total <= 0.0:
        return [1.0] * len(energies)
    shares: list[float] = (energies.double().cumsum(0) / total).clamp_max(1.0).tolist()
    return shares


def least_size(kept: Sequence[float], share: float) -> int:
    """The index of the first size that keeps a share of the energy.

    Examples:
        >>> least_size([0.6, 0.9, 1.0], 0.9)
        1

    Source: Ge et al., CERSA (2026, arXiv 2605.08174): the least rank whose cumulative spectral energy reaches α.
    """
    return min(bisect.bisect_left(kept, share - _ROUNDING), len(kept) - 1)


def rank_of_energy(singular_values: Tensor, share: float) -> int:
    """The least k for which the k largest singular values hold a share of the squared Frobenius norm.

    Args:
        singular_values: all singular values of a weight, (n,), descending.
        share: of Σᵢ σᵢ², above 0 and at most 1.

    Returns:
        k, from 1 to n; 1 for a zero weight.

    Examples:
        >>> rank_of_energy(torch.tensor([4.0, 3.0, 0.0]), 0.64)
        1
    """
    return 1 + least_size(kept_shares(singular_values.double().square()), share)


def spend(layers: Sequence[Sizes], budget: int, *, logarithm: bool = False) -> list[int]:
    """The indices of the sizes that hold the most energy, summed over layers, for a number of parameters in all.

    Greedy: a layer grows where the next parameter buys the most energy. Where a step buys less than a longer one for
    each parameter, the longer one is taken whole, so that the choice is the best for what it spends.

    Args:
        layers: what each layer may have; each has at least its first size.
        budget: parameters of all layers together.
        logarithm: sum the logarithms of the shares, so that doubling a share counts alike in every layer.

    Raises:
        ValueError: the first sizes cost more than the budget; says how much they cost.

    Examples:
        >>> steep = Sizes([1, 2, 3], [1, 4, 9], [0.9, 0.95, 1.0])
        >>> flat = Sizes([1, 2, 3], [1, 4, 9], [0.4, 0.7, 1.0])
        >>> spend([steep, flat], 10)
        [0, 2]

    Source: the greedy bound of Sinha and Zoltners, The multiple-choice knapsack problem (1979).
    """
    least = sum(layer.prices[0] for layer in layers)
    if budget < least:
        raise ValueError(
            f"A budget of {budget:,} parameters is too small for {len(layers)} layers, whose smallest sizes have "
            f"{least:,} together. Give a larger budget, or choose fewer target_modules."
        )
    steps = []
    for index, layer in enumerate(layers):
        values = [math.log(max(share, 1e-300)) for share in layer.kept] if logarithm else list(layer.kept)
        corners = _upper_hull(layer.prices, values)
        for low, high in itertools.pairwise(corners):
            gain = (values[high] - values[low]) / max(layer.prices[high] - layer.prices[low], 1e-300)
            steps.append((-gain, index, high))
    chosen, left = [0] * len(layers), budget - least
    for _, index, wanted in sorted(steps):
        prices, now = layers[index].prices, chosen[index]
        most = bisect.bisect_right(prices, prices[now] + left, now, wanted + 1)
        fitting = max(range(now, most), key=layers[index].kept.__getitem__)  # the smallest of those that keep the most
        left -= prices[fitting] - prices[now]
        chosen[index] = fitting
    return chosen


def _upper_hull(prices: Sequence[int], values: Sequence[float]) -> list[int]:
    """The indices of the corners of the least concave curve above these points, whose slopes descend."""
    corners: list[int] = []
    for index, (price, value) in enumerate(zip(prices, values, strict=True)):
        if corners and value <= values[corners[-1]]:
            continue  # a larger size that keeps no more
        while len(corners) > 1:
            first, last = corners[-2:]
            rise, run = values[last] - values[first], prices[last] - prices[first]
            if rise * (price - prices[first]) > (value - values[first]) * run:
                break
            corners.pop()
        corners.append(index)
    return corners
