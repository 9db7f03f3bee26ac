"""Energies of weights and outputs against plain torch, and choices against trying all of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.subspace.cache import SubspaceCache
from isotune.subspace.energy import (
    Sizes,
    block_shares,
    kept_shares,
    least_size,
    output_energies,
    spectrum,
    spend,
)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_spectrum_is_that_of_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(spectrum(weight), torch.linalg.svdvals(weight.double()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_output_energies_are_measured_on_inputs(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = (
        torch.randn(shape, generator=generator).double(),
        torch.randn(200, shape[1], generator=generator).double(),
    )
    left = torch.linalg.svd(weight, full_matrices=False).U
    expected = (x @ weight.mT @ left).square().sum(0)
    found = output_energies(weight, x.mT @ x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(), (x @ weight.mT).square().sum())


def test_white_inputs_give_the_energies_of_the_weight() -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(output_energies(weight, torch.eye(9)), spectrum(weight).square())


@pytest.mark.parametrize("size", [2, 3, 6])
def test_block_shares_are_those_of_small_rotations(size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(4, 6, generator=generator).double(), torch.randn(50, 6, generator=generator).double()
    effects = {}
    for i, j in itertools.combinations(range(6), 2):
        plane = torch.zeros(6, 6, dtype=torch.float64)
        plane[i, j], plane[j, i] = 1.0, -1.0
        effects[i, j] = float((x @ plane.mT @ weight.mT).square().sum())
    within = sum(effect for (i, j), effect in effects.items() if i // size == j // size)
    (share,) = block_shares(6, [size], weight, x.mT @ x)
    assert share == pytest.approx(within / sum(effects.values()))
    assert block_shares(6, [size]) == [(size - 1) / 5]


def test_spectra_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, cache = torch.randn(8, 6, generator=torch.Generator().manual_seed(4)), SubspaceCache(tmp_path)
    first = spectrum(weight, cache=cache)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda *_: pytest.fail("solved again"))
    assert torch.equal(spectrum(weight.clone(), cache=cache), first)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-8])
    monkeypatch.undo()
    assert torch.equal(spectrum(weight, cache=cache), first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.eye(3)
    with pytest.raises(ValueError, match="module 'q': its inputs on the given data hold NaN or infinity"):
        output_energies(weight, torch.full((3, 3), bad), name="module 'q'")
    weight[0, 0] = bad
    with pytest.raises(ValueError, match="module 'q': the weight holds NaN or infinity"):
        spectrum(weight, name="module 'q'")


def test_no_energy_needs_no_direction() -> None:
    assert kept_shares(torch.zeros(3)) == [1.0, 1.0, 1.0]
    assert least_size([1.0, 1.0], 0.9) == 0
    assert least_size(kept_shares(torch.tensor([0.1] * 10)), 1.0) == 9


_energies = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5).map(lambda found: sorted(found, reverse=True))


def _layer(energies: list[float]) -> Sizes:
    """A layer at PSOFT's prices, r(r − 1)/2 + 2r."""
    ranks = range(1, len(energies) + 1)
    return Sizes(ranks, [r * (r - 1) // 2 + 2 * r for r in ranks], kept_shares(torch.tensor(energies)))


@given(st.lists(_energies, min_size=1, max_size=3), st.integers(0, 60))
def test_a_greedy_choice_is_the_best_for_what_it_spends(spectra: list[list[float]], more: int) -> None:
    layers = [_layer(energies) for energies in spectra]
    budget = 2 * len(layers) + more
    chosen = spend(layers, budget)

    def cost(places: tuple[int, ...]) -> int:
        return sum(layer.prices[place] for layer, place in zip(layers, places, strict=True))

    def value(places: tuple[int, ...]) -> float:
        return sum(layer.kept[place] for layer, place in zip(layers, places, strict=True))

    spent = cost(tuple(chosen))
    assert spent <= budget
    everything = list(itertools.product(*(range(len(layer.sizes)) for layer in layers)))
    # Nothing that fits is left out if it could be had beside the rest.
    for index, layer in enumerate(layers):
        for place in range(chosen[index] + 1, len(layer.sizes)):
            assert layer.kept[place] <= layer.kept[chosen[index]] or (
                spent - layer.prices[chosen[index]] + layer.prices[place] > budget
            )
    # And what is best loses no more than the energy of one direction.
    best = max(value(places) for places in everything if cost(places) <= budget)
    steps = [b - a for layer in layers for a, b in itertools.pairwise((0.0, *layer.kept))]
    assert value(tuple(chosen)) >= best - max(steps) - 1e-9


def test_a_step_that_buys_little_is_taken_with_the_next() -> None:
    # Outputs' energies need not descend: here the second direction is worth nothing and the third all.
    late, other = Sizes([1, 2, 3], [1, 2, 3], [0.0, 0.0, 1.0]), Sizes([1, 2, 3], [1, 2, 3], [0.5, 0.7, 1.0])
    assert spend([late, other], 4) == [2, 0]
    assert spend([late, other], 3) == [0, 1]


def test_logarithms_let_every_layer_grow() -> None:
    sizes = (2, 4, 8)
    narrow, wide = (Sizes(sizes, [n * (b - 1) // 2 for b in sizes], block_shares(n, sizes)) for n in (8, 64))
    budget = narrow.prices[0] + wide.prices[1] + 4
    assert spend([narrow, wide], budget) == [2, 0]  # all that fits into the narrow one
    assert spend([narrow, wide], 2 * budget, logarithm=True) == [2, 1]
    assert spend([wide, wide], wide.prices[1] + wide.prices[0], logarithm=True) == [1, 0]


def test_a_budget_below_the_smallest_sizes_is_refused() -> None:
    with pytest.raises(
        ValueError, match="budget of 3 parameters is too small for 2 layers, whose smallest sizes have 4"
    ):
        spend([_layer([1.0])] * 2, 3)
