"""Skew-symmetric matrices from vectors and back."""

from __future__ import annotations

import pytest
import torch

from isotune.algebra.skew import skew_from_vector, skew_size, vector_from_skew


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_there_and_back(n: int, leading: tuple[int, ...]) -> None:
    entries = torch.randn(*leading, skew_size(n))
    matrix = skew_from_vector(entries, n)
    assert matrix.shape == (*leading, n, n)
    assert torch.equal(matrix, -matrix.mT)
    assert torch.equal(vector_from_skew(matrix), entries)


def test_entries_are_the_strict_upper_triangle_row_by_row() -> None:
    expected = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]])
    assert torch.equal(skew_from_vector(torch.tensor([1.0, 2.0, 3.0]), 3), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert skew_from_vector(torch.randn(6, dtype=dtype), 4).dtype == dtype


@pytest.mark.parametrize(("n", "given"), [(3, 2), (3, 4), (1, 1), (4, 16)])
def test_refuses_a_wrong_number_of_entries(n: int, given: int) -> None:
    with pytest.raises(ValueError, match=f"{skew_size(n)} free entries, but {given}"):
        skew_from_vector(torch.zeros(given), n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients(n: int) -> None:
    entries = torch.randn(2, skew_size(n), dtype=torch.float64, requires_grad=True)
    if n > 1:
        assert torch.autograd.gradcheck(lambda e: skew_from_vector(e, n), entries)
        assert torch.autograd.gradgradcheck(lambda e: skew_from_vector(e, n), entries)
    (gradient,) = torch.autograd.grad(skew_from_vector(entries, n).triu(1).sum(), entries)
    assert torch.equal(gradient, torch.ones_like(entries))
