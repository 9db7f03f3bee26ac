"""Compact products of reflections against the product of the reflections themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.algebra.factors import LowRank, apply_chain, transpose_chain
from isotune.algebra.householder import orthonormal_reflection, reflection_penalty, reflections, unit_rows


def whole(left: Tensor, right: Tensor) -> Tensor:
    return torch.eye(left.shape[-2], dtype=left.dtype) + left @ right


def twin(vectors: Tensor) -> Tensor:
    """M = H_r ⋯ H₂ H₁ with H_i = I − 2 v vᵀ / (v · v), the identity for v = 0."""
    product = torch.eye(vectors.shape[-1], dtype=vectors.dtype)
    for row in vectors:
        if bool(row.any()):
            reflection = torch.eye(len(row), dtype=row.dtype) - 2 * torch.outer(row, row) / row.dot(row)
            product = reflection @ product
    return product


def orthogonality(matrix: Tensor) -> float:
    matrix = matrix.double()
    return float((matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=torch.float64)).abs().max())


counts = st.integers(1, 8)
widths = st.integers(1, 20)
seeds = st.integers(0, 2**20)


@given(r=counts, n=widths, seed=seeds)
def test_equals_the_product_of_reflections(r: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(r, n, dtype=torch.float64, requires_grad=True)
    left, right = reflections(vectors)
    assert left.shape == (n, r)
    assert right.shape == (r, n)
    ours, theirs = whole(left, right), twin(vectors)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(ours)
    (found,) = torch.autograd.grad(ours, vectors, weights)
    (expected,) = torch.autograd.grad(theirs, vectors, weights)
    # Measured along the unit directions: a row that happens to be short has a large gradient.
    lengths = vectors.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(found * lengths, expected * lengths, rtol=1e-9, atol=1e-10)


def test_the_first_row_acts_on_columns_first() -> None:
    vectors = torch.randn(2, 4, dtype=torch.float64)
    first, second = twin(vectors[:1]), twin(vectors[1:])
    found = whole(*reflections(vectors))
    torch.testing.assert_close(found, second @ first)
    assert not torch.allclose(found, first @ second)


@pytest.mark.parametrize(("r", "n"), [(1, 3), (3, 5), (5, 4)])
def test_gradcheck(r: int, n: int) -> None:
    vectors = torch.randn(r, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reflections, vectors)
    assert torch.autograd.gradcheck(unit_rows, vectors)
    assert torch.autograd.gradcheck(reflection_penalty, vectors)


def test_a_second_derivative_is_right_or_refused() -> None:
    vectors = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(reflection_penalty, vectors)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(reflections(vectors)[0].sum(), vectors, create_graph=True)


def test_through_a_layer_and_transposed() -> None:
    vectors = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    chain = (LowRank(),)
    torch.testing.assert_close(apply_chain(x, chain, reflections(vectors)), x @ twin(vectors))
    back = apply_chain(x, *transpose_chain(chain, reflections(vectors)))
    torch.testing.assert_close(back, x @ twin(vectors).T)
    assert torch.autograd.gradcheck(lambda x, v: apply_chain(x, chain, reflections(v)), (x, vectors))


@given(
    r=st.integers(1, 16),
    n=st.integers(1, 64),
    exponents=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    by_row=st.booleans(),
    seed=seeds,
)
def test_orthogonal_in_single_precision_at_any_scale(
    r: int, n: int, exponents: tuple[float, float], by_row: bool, seed: int
) -> None:
    """Squares of 1e20 overflow and those of 1e-20 vanish; rows, or the entries within a row, differ by up to 1e40."""
    torch.manual_seed(seed)
    low, high = exponents
    spread = torch.rand(r, 1) if by_row else torch.rand(r, n)
    vectors = torch.randn(r, n) * 10.0 ** (low + (high - low) * spread)
    matrix = whole(*reflections(vectors))
    assert orthogonality(matrix) <= 1e-5
    torch.testing.assert_close(matrix.double(), twin(vectors.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e30, 1e-30])
def test_the_gradient_survives_any_scale(scale: float) -> None:
    vectors = (scale * torch.randn(4, 10)).requires_grad_()
    exact = vectors.detach().double().requires_grad_()
    weights = torch.randn(10, 10)
    (found,) = torch.autograd.grad(whole(*reflections(vectors)), vectors, weights)
    (expected,) = torch.autograd.grad(twin(exact), exact, weights.double())
    assert (found.double() - expected).norm() <= 1e-4 * expected.norm()


@given(pairs=st.integers(1, 4), n=st.integers(1, 40), scale=st.sampled_from([1e-20, 1.0, 1e20]), seed=seeds)
def test_pairs_of_equal_rows_are_the_identity(pairs: int, n: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    rows = (scale * torch.randn(pairs, n)).repeat_interleave(2, 0)
    assert not torch.allclose(whole(*reflections(rows[:-1])), torch.eye(n), atol=1e-2)
    atol = 1e-6 if pairs == 1 else 2e-6  # the most in 16,000 draws: 0.9e-6 for one pair, 1.5e-6 for four
    torch.testing.assert_close(whole(*reflections(rows)), torch.eye(n), rtol=0, atol=atol)


@pytest.mark.parametrize("copies", [3, 16, 33])
def test_many_equal_rows_stay_orthogonal(copies: int) -> None:
    rows = torch.randn(1, 24).expand(copies, 24)
    matrix = whole(*reflections(rows))
    assert orthogonality(matrix) <= 1e-5
    torch.testing.assert_close(matrix.double(), twin(rows.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("zeros", [[0], [1], [3], [0, 2], [0, 1, 2, 3]])
def test_a_zero_row_reflects_nothing(zeros: list[int]) -> None:
    vectors = torch.randn(4, 6, dtype=torch.float64)
    vectors[zeros] = 0
    vectors.requires_grad_()
    others = [row for row in range(4) if row not in zeros]
    matrix = whole(*reflections(vectors))
    torch.testing.assert_close(matrix, twin(vectors[others]), rtol=1e-12, atol=1e-12)
    assert not unit_rows(vectors)[zeros].any()
    loss = (matrix * torch.randn_like(matrix)).sum() + reflection_penalty(vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert bool(torch.isfinite(gradient).all())
    assert not gradient[zeros].any()
    assert bool(gradient[others].any(dim=1).all())


def test_leading_dimensions_are_products_by_themselves() -> None:
    vectors = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    matrices = whole(*reflections(vectors))
    orthonormal = whole(*orthonormal_reflection(vectors))
    penalty = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(matrices[i, j], twin(vectors[i, j]))
            torch.testing.assert_close(orthonormal[i, j], whole(*orthonormal_reflection(vectors[i, j])))
            penalty = penalty + reflection_penalty(vectors[i, j])
    torch.testing.assert_close(reflection_penalty(vectors), penalty)


@given(r=counts, n=widths, exponent=st.floats(-20, 20), seed=seeds)
def test_unit_rows_have_length_one_and_their_direction(r: int, n: int, exponent: float, seed: int) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(r, n) * 10.0**exponent
    units = unit_rows(vectors).double()
    exact = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(units.norm(dim=1), torch.ones(r).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(units, exact, rtol=1e-6, atol=0)


@given(r=st.integers(1, 5), extra=st.integers(0, 8), seed=seeds)
def test_the_orthonormal_reflection_negates_the_span(r: int, extra: int, seed: int) -> None:
    torch.manual_seed(seed)
    n = r + extra
    # Kept away from linear dependence, where the span, and so the twin, is ill-defined.
    vectors = 0.5 * torch.randn(r, n, dtype=torch.float64) / n**0.5 + 2 * torch.eye(r, n, dtype=torch.float64)
    vectors.requires_grad_()
    left, right = orthonormal_reflection(vectors)
    assert left.shape == (n, r)
    assert right.shape == (r, n)
    projection = vectors.T @ torch.linalg.inv(vectors @ vectors.T) @ vectors
    ours, theirs = whole(left, right), torch.eye(n, dtype=torch.float64) - 2 * projection
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vectors @ ours, -vectors, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(ours)
    (found,) = torch.autograd.grad(ours, vectors, weights)
    (expected,) = torch.autograd.grad(theirs, vectors, weights)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("r", "n"), [(1, 4), (3, 5), (4, 4)])
def test_gradcheck_of_the_orthonormal_reflection(r: int, n: int) -> None:
    vectors = torch.randn(r, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: whole(*orthonormal_reflection(v)), vectors)


@pytest.mark.parametrize(("r", "n"), [(1, 8), (8, 64), (16, 16)])
def test_the_orthonormal_reflection_is_orthogonal_in_single_precision(r: int, n: int) -> None:
    matrix = whole(*orthonormal_reflection(torch.randn(r, n)))
    assert orthogonality(matrix) <= 1e-5
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-6)
    assert torch.trace(matrix).item() == pytest.approx(n - 2 * r, abs=1e-3)


@given(r=counts, n=widths, seed=seeds)
def test_the_penalty_is_the_distance_of_the_gram_matrix_from_the_identity(r: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    vectors = torch.randn(r, n, dtype=torch.float64)
    expected = 0.0
    for i in range(r):
        for j in range(r):
            cosine = float(vectors[i].dot(vectors[j]) / (vectors[i].norm() * vectors[j].norm()))
            expected += (cosine - (i == j)) ** 2
    assert reflection_penalty(vectors).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_penalty_of_orthogonal_and_of_equal_rows() -> None:
    orthogonal = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q.T * torch.tensor(
        [[1e3], [1.0], [0.1], [5.0]]
    )
    assert reflection_penalty(orthogonal).item() < 1e-24
    assert reflection_penalty(torch.ones(3, 6, dtype=torch.float64)).item() == pytest.approx(6.0)
