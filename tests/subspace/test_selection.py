from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_solvers import assert_orthonormal, sine, weight_like, with_spectrum

from isotune.subspace.selection import SELECTIONS, chosen, drawn_start, singular_subspace
from isotune.subspace.solvers import principal_subspace

NESTED = [name for name in SELECTIONS if name != "band"]


def test_the_ends_and_a_band_of_six_triplets() -> None:
    assert chosen(6, 4).tolist() == [0, 1, 2, 3]
    assert chosen(6, 4, "bottom").tolist() == [2, 3, 4, 5]
    assert chosen(6, 4, "mixed").tolist() == [0, 1, 4, 5]
    assert chosen(6, 3, "mixed").tolist() == [0, 1, 5]
    assert chosen(6, 1, "mixed").tolist() == [0]
    assert chosen(6, 4, "band", start=1).tolist() == [1, 2, 3, 4]
    assert all(chosen(6, 6, name).tolist() == list(range(6)) for name in NESTED)


@given(name=st.sampled_from(NESTED), sizes=st.lists(st.integers(1, 60), min_size=3, max_size=3).map(sorted))
def test_choosing_among_the_chosen_is_choosing_among_all(name: str, sizes: list[int]) -> None:
    few, more, count = sizes
    candidates = chosen(count, more, name)
    assert torch.equal(candidates[chosen(more, few, name)], chosen(count, few, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_spans_the_true_vectors_in_order(selection: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, vectors = weight_like(*shape)
    start = 6 if selection == "band" else None
    places = chosen(len(vectors), 7, selection, start=start)
    found = singular_subspace(weight.to(dtype), 7, selection, start=start)
    assert found.basis.dtype == dtype
    assert found.basis.shape == (7, shape[1])
    assert_orthonormal(found.basis, 1e-6 if dtype == torch.float32 else 1e-12)
    assert sine(found.basis, vectors[places]) < (1e-4 if dtype == torch.float32 else 1e-11)
    values = (places + 1).double() ** -0.5
    torch.testing.assert_close(found.singular_values.double(), values, rtol=1e-5, atol=0.0)
    every = torch.arange(1, len(vectors) + 1, dtype=torch.float64) ** -1.0
    assert found.energy == pytest.approx(float(values.square().sum() / every.sum()), rel=1e-6)


def test_the_bottom_of_a_wide_weight_is_outside_of_its_null_space() -> None:
    weight, _ = with_spectrum(8, 40, torch.linspace(2.0, 1.0, 8, dtype=torch.float64))
    found = singular_subspace(weight, 3, "bottom")
    assert torch.linalg.vector_norm(weight @ found.basis.T, dim=0).min() > 0.99


def test_the_top_is_the_principal_subspace() -> None:
    weight, _ = weight_like(40, 30)
    expected = principal_subspace(weight.float(), 5, solver="full")
    found = singular_subspace(weight.float(), 5)
    assert sine(found.basis, expected.basis) < 1e-6
    assert found.energy == pytest.approx(expected.energy)


def test_the_weakest_directions_of_real_half_precision_weights_are_those_of_a_float64_svd() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = torch.linalg.svd(weight.double(), full_matrices=False).Vh[-5:]
    assert sine(singular_subspace(weight, 5, "bottom").basis, expected) < 1e-6


def test_a_zero_weight_has_directions_too() -> None:
    found = singular_subspace(torch.zeros(6, 4), 2, "bottom")
    assert_orthonormal(found.basis)
    assert found.energy == 1.0
    assert not found.singular_values.any()


def test_a_drawn_band_begins_anywhere_equally_often_and_can_be_drawn_again() -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = [drawn_start(12, 4, generator) for _ in range(900)]
    counts = Counter(drawn)
    assert sorted(counts) == list(range(9))
    assert all(60 <= times <= 140 for times in counts.values())
    again = torch.Generator().manual_seed(5)
    assert [drawn_start(12, 4, again) for _ in range(900)] == drawn
    assert drawn_start(4, 4, generator) == 0


@pytest.mark.parametrize(
    ("rank", "selection", "start", "message"),
    [
        (7, "top", None, r"^layer: rank is 7, but of 6 singular triplets 1 to 6"),
        (0, "bottom", None, r"^layer: rank is 0"),
        (True, "top", None, r"^layer: rank is True"),
        (2, "middle", None, r"^layer: selection is 'middle'; choose one of 'top', 'bottom', 'mixed', 'band'"),
        (2, "band", None, r"^layer: start is None, but selection='band' needs the first place"),
        (2, "top", 1, r"^layer: start is 1, but selection='top' has no first place"),
        (2, "band", 5, r"^layer: start is 5, but a band of 2 of 6 .* from 0 to 4"),
        (2, "band", -1, r"^layer: start is -1"),
    ],
)
def test_says_what_is_allowed(rank: int, selection: str, start: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        singular_subspace(torch.randn(9, 6), rank, selection, start=start, name="layer")


@pytest.mark.parametrize("weight", [torch.zeros(0, 4), torch.zeros(3), torch.tensor([[1, 2]]), torch.eye(3) / 0.0])
def test_refuses_what_is_no_finite_matrix(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^layer: "):
        singular_subspace(weight, 1, "bottom", name="layer")
