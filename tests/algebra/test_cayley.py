"""The Cayley transform, exact and truncated, against the formulas as written in the papers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from isotune.algebra import cayley
from isotune.algebra.cayley import bound_entries, neumann_difference, orthogonal_difference
from isotune.algebra.skew import skew_from_vector, skew_size, vector_from_skew

SIZES = [1, 2, 3, 5, 8]
LEADING = [(), (3,), (2, 2)]


def random_entries(n: int, norm: float, leading: tuple[int, ...] = ()) -> Tensor:
    """The free entries of `random_skew`, a leaf."""
    return vector_from_skew(random_skew(n, norm, leading)).requires_grad_()


def random_skew(n: int, norm: float = 1.0, leading: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Tensor:
    """Skew-symmetric matrices with spectral norm `norm` (none for n = 1, which has only zero)."""
    matrix = torch.randn(*leading, n, n, dtype=torch.float64)
    skew = matrix - matrix.mT
    if n > 1:
        skew = skew * (norm / torch.linalg.matrix_norm(skew, 2)[..., None, None])
    return skew.to(dtype)


def cayley_difference(generator: Tensor) -> Tensor:
    """The exact transform of Q itself."""
    return orthogonal_difference(vector_from_skew(generator), generator.shape[-1])


def twin(generator: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ − I with torch's inverse."""
    eye = torch.eye(generator.shape[-1], dtype=generator.dtype)
    return (eye + generator) @ torch.linalg.inv(eye - generator) - eye


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("leading", LEADING)
def test_exact_equals_its_plain_torch_twin(n: int, leading: tuple[int, ...]) -> None:
    entries = random_entries(n, 1.5, leading)
    same = entries.detach().clone().requires_grad_()
    weights = torch.randn(*leading, n, n, dtype=torch.float64)
    ours, theirs = orthogonal_difference(entries, n), twin(skew_from_vector(same, n))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(entries.grad, same.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("leading", LEADING)
def test_gradcheck_and_gradgradcheck(n: int, leading: tuple[int, ...]) -> None:
    entries = random_entries(n, 0.9, leading)
    assert torch.autograd.gradcheck(lambda e: orthogonal_difference(e, n), entries)
    # Entry by entry where that is quick, else along random directions.
    assert torch.autograd.gradgradcheck(lambda e: orthogonal_difference(e, n), entries, fast_mode=entries.numel() > 12)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_gradcheck_of_the_neumann_series(terms: int) -> None:
    generator = random_skew(4, 0.7, (2,)).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: neumann_difference(q, terms), generator)
    assert torch.autograd.gradgradcheck(lambda q: neumann_difference(q, terms), generator, fast_mode=True)


@pytest.mark.parametrize("n", [2, 3, 46, 194, 352])
@pytest.mark.parametrize("norm", [1e-3, 0.3, 1.0, 3.0, 10.0])
def test_orthogonal_in_single_precision(n: int, norm: float) -> None:
    rotation = cayley_difference(random_skew(n, norm, dtype=torch.float32)) + torch.eye(n)
    error = (rotation.double().T @ rotation.double() - torch.eye(n, dtype=torch.float64)).abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("norm", [1e-6, 1e-4])
def test_a_small_rotation_keeps_its_relative_precision(norm: float) -> None:
    generator = random_skew(16, norm)
    found = cayley_difference(generator.float()).double()
    assert (found - twin(generator)).norm() <= 1e-6 * twin(generator).norm()


def test_it_is_a_rotation_and_its_inverse_is_the_negated_generator() -> None:
    generator = random_skew(6, 2.0)
    eye = torch.eye(6, dtype=torch.float64)
    rotation = cayley_difference(generator) + eye
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0)
    torch.testing.assert_close(rotation @ (cayley_difference(-generator) + eye), eye)


def test_the_sign_is_that_of_the_exponential() -> None:
    """R = I + 2Q + O(Q²): PEFT's OFT has one sign with the exact form and the other with the series."""
    generator = random_skew(5, 1e-5)
    for difference in (cayley_difference(generator), neumann_difference(generator, 1)):
        torch.testing.assert_close(difference, 2 * generator, rtol=1e-4, atol=1e-9)


def test_zero_gives_exactly_the_identity() -> None:
    zero = torch.zeros(3, 7, 7)
    assert not cayley_difference(zero).any()
    assert not neumann_difference(zero, 5).any()


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 9])
def test_the_series_is_the_truncated_product(terms: int) -> None:
    generator = random_skew(6, 0.8, (2,))
    eye = torch.eye(6, dtype=torch.float64)
    series = sum(torch.linalg.matrix_power(generator, power) for power in range(terms + 1))
    expected = (eye + generator) @ series - eye
    torch.testing.assert_close(neumann_difference(generator, terms), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("n", [2, 5, 16])
def test_each_further_term_is_closer(n: int, norm: float) -> None:
    generator = random_skew(n, norm)
    exact = cayley_difference(generator)
    errors = [float((neumann_difference(generator, k) - exact).norm()) for k in range(1, 12)]
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("terms", [0, -1])
def test_a_series_needs_a_term(terms: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        neumann_difference(torch.zeros(2, 2), terms)


@pytest.mark.parametrize("norm", [1e-3, 0.2, 0.5, 3.0, 1e6])
def test_the_bound_is_never_exceeded_and_smaller_ones_are_left_alone(norm: float) -> None:
    generator = random_skew(6, 1.0, (4,), torch.float32)
    entries = vector_from_skew(generator * (norm / torch.linalg.matrix_norm(generator, keepdim=True)))
    bounded = bound_entries(entries, 0.5)
    norms = torch.linalg.matrix_norm(skew_from_vector(bounded.double(), 6))
    assert bool((norms <= 0.5 * (1 + 1e-6)).all())
    if norm < 0.5:
        assert torch.equal(bounded, entries)
    else:
        torch.testing.assert_close(bounded * (norm / 0.5), entries)


def test_the_bound_is_of_each_matrix_by_itself() -> None:
    entries = vector_from_skew(torch.stack([random_skew(4, 5.0), random_skew(4, 0.01)]))
    assert torch.equal(bound_entries(entries, 0.5)[1], entries[1])


@pytest.mark.parametrize("norm", [0.1, 2.0])
def test_the_bound_has_a_gradient(norm: float) -> None:
    entries = random_entries(4, norm, (2,))
    assert torch.autograd.gradcheck(lambda e: bound_entries(e, 0.5), entries)
    (gradient,) = torch.autograd.grad(bound_entries(entries, 0.5).square().sum(dim=-1)[0], entries)
    # Above the bound the norm is constant, so its gradient vanishes; below it is that of the norm itself.
    assert (float(gradient[0].norm()) < 1e-12) == (norm > 0.5)


def test_the_bound_of_a_zero_generator_is_finite() -> None:
    entries = torch.zeros(3, requires_grad=True)
    bounded = bound_entries(entries, 0.5)
    (bounded * torch.arange(3.0)).sum().backward()
    assert not bounded.any()
    assert entries.grad is not None
    assert bool(torch.isfinite(entries.grad).all())


@pytest.mark.parametrize("n", [2, 8, 11])
def test_the_small_diagonal_of_a_small_rotation_is_kept(n: int) -> None:
    entries = 1e-3 * torch.randn(5, skew_size(n))
    exact = twin(skew_from_vector(entries.double(), n)).diagonal(dim1=1, dim2=2)
    found = orthogonal_difference(entries, n).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_an_export_has_the_same_transform_by_products_alone(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = size * torch.randn(3, 28, dtype=torch.float64)
    expected = orthogonal_difference(entries, 8)
    monkeypatch.setattr(cayley, "is_exported", lambda: True)
    torch.testing.assert_close(orthogonal_difference(entries, 8), expected, rtol=1e-9, atol=1e-12)
