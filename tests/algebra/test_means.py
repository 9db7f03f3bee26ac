"""Means of rotations, factors and free numbers against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.algebra.cayley import bound_entries, orthogonal_difference
from isotune.algebra.means import geometric_mean, linear_mean, rotation_mean
from isotune.algebra.skew import skew_from_vector, skew_size


def rotation(entries: Tensor, n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) + orthogonal_difference(entries.double(), n)


def logarithm(matrix: Tensor) -> Tensor:
    """The principal logarithm, by the eigenvalues of a plain decomposition."""
    values, vectors = torch.linalg.eig(matrix)
    return (vectors @ torch.diag_embed(values.log()) @ torch.linalg.inv(vectors)).real


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12])
def test_it_is_the_exponential_of_the_mean_logarithm(n: int) -> None:
    entries, weights = torch.randn(3, 2, skew_size(n), dtype=torch.float64) * 0.4, torch.tensor([0.5, 0.3, -0.2])
    found = rotation(rotation_mean(entries, weights), n)
    logs = logarithm(rotation(entries, n))
    expected = torch.matrix_exp(torch.einsum("k,kbij->bij", weights.double(), logs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    eye = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    torch.testing.assert_close(found.mT @ found, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("std", [1e-6, 0.1, 3.0])
def test_weight_one_gives_back_the_generator(std: float) -> None:
    entries = (torch.randn(2, 5, skew_size(6)) * std).float()
    for weights, chosen in (([1.0, 0.0], 0), ([0.0, 1.0], 1)):
        found = rotation_mean(entries, torch.tensor(weights))
        assert float((found - entries[chosen]).norm() / entries[chosen].norm()) < 1e-6


def test_a_plane_is_turned_by_the_mean_angle() -> None:
    angles = torch.tensor([0.5, 2.9], dtype=torch.float64)
    mean = rotation_mean(torch.tan(angles / 2)[:, None], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(2 * torch.arctan(mean), torch.tensor([0.25 * 0.5 + 0.75 * 2.9], dtype=torch.float64))
    # Past half a turn it comes round from the other side, and half a turn itself is refused.
    twice = rotation_mean(torch.tan(angles[1:] / 2)[:, None], torch.tensor([2.0]))
    torch.testing.assert_close(rotation(twice, 2), torch.linalg.matrix_power(rotation(torch.tan(angles[1:] / 2), 2), 2))
    with pytest.raises(ValueError, match="half a turn"):
        rotation_mean(torch.ones(1, 1), torch.tensor([2.0]))


def test_the_order_and_common_coordinates_do_not_matter() -> None:
    n, weights = 5, torch.tensor([0.7, 0.4])
    entries = torch.randn(2, skew_size(n), dtype=torch.float64)
    found = rotation_mean(entries, weights)
    torch.testing.assert_close(rotation_mean(entries.flip(0), weights.flip(0)), found)
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    rows, columns = torch.triu_indices(n, n, offset=1)
    turned = (turn @ skew_from_vector(entries, n) @ turn.T)[:, rows, columns]
    other = turn @ rotation(found, n) @ turn.T
    torch.testing.assert_close(rotation(rotation_mean(turned, weights), n), other)


def test_bounded_generators_are_averaged_as_they_act() -> None:
    entries = torch.randn(2, skew_size(4), dtype=torch.float64)
    found = rotation_mean(entries, torch.tensor([1.0, 0.0]), 0.1)
    torch.testing.assert_close(found, bound_entries(entries[0], 0.1))
    bounded, weights = bound_entries(entries, 0.1), torch.tensor([0.5, 0.5])
    found = rotation_mean(entries, weights, 0.1, corrected=True)
    torch.testing.assert_close(found, linear_mean(bounded, weights, corrected=True))
    torch.testing.assert_close(found.norm(), torch.tensor(0.1 / 2**0.5, dtype=torch.float64))


def test_the_other_means() -> None:
    values, weights = torch.tensor([[1.0, 4.0], [4.0, 9.0]]), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(geometric_mean(values, weights), torch.tensor([2.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(linear_mean(values, weights), torch.tensor([2.5, 6.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="not above 0"):
        geometric_mean(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))


def cayley_generator(matrix: Tensor) -> Tensor:
    """Q of a rotation, by its definition."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(matrix + eye, matrix - eye)


@given(n=st.integers(2, 6), count=st.integers(1, 4), blocks=st.integers(1, 3), std=st.floats(0.01, 3.0))
def test_the_corrected_mean_is_as_the_authors_compute_it(n: int, count: int, blocks: int, std: float) -> None:
    """The norm of one layer's mean generator is the mean of the norms, its direction that of the sum."""
    entries = torch.randn(count, blocks, skew_size(n), dtype=torch.float64) * std
    found = rotation_mean(entries, torch.full((count,), 1 / count), corrected=True)
    given_generators = [torch.stack([cayley_generator(rotation(block, n)) for block in own]) for own in entries]
    total = torch.stack(given_generators).sum(0)
    expected = total / total.norm() * sum(own.norm() for own in given_generators) / count
    generators = torch.stack([cayley_generator(rotation(block, n)) for block in found])
    torch.testing.assert_close(generators, expected, rtol=1e-6, atol=1e-9)


@given(n=st.integers(2, 6), share=st.floats(0.0, 1.0), std=st.floats(1e-4, 3.0))
def test_equal_rotations_have_themselves_for_a_mean(n: int, share: float, std: float) -> None:
    entries = (torch.randn(1, 2, skew_size(n), dtype=torch.float64) * std).expand(2, -1, -1)
    weights = torch.tensor([share, 1 - share], dtype=torch.float64)
    for mean in (rotation_mean, linear_mean):
        torch.testing.assert_close(mean(entries, weights, corrected=True), entries[0])


def test_a_mean_without_a_direction_is_refused() -> None:
    entries = torch.randn(1, 3, skew_size(4))
    with pytest.raises(ValueError, match="cancel"):
        rotation_mean(torch.cat([entries, -entries]), torch.tensor([0.5, 0.5]), corrected=True)
    with pytest.raises(ValueError, match="below 0"):
        rotation_mean(entries, torch.tensor([-0.5]), corrected=True)
    nothing = rotation_mean(torch.zeros(2, 3, skew_size(4)), torch.tensor([0.5, 0.5]), corrected=True)
    assert not bool(nothing.any())
    scales = torch.tensor([[1.0, 4.0], [4.0, 9.0]])
    torch.testing.assert_close(
        geometric_mean(scales, torch.tensor([0.5, 0.5]), corrected=True), torch.tensor([2.0, 6.0], dtype=torch.float64)
    )
