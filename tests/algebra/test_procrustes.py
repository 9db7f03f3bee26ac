"""Nearest rotations, their generators and reflections, against their definitions and against a search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.algebra.householder import reflections
from isotune.algebra.procrustes import (
    LARGEST_TANGENT,
    generator_of,
    nearest_rotation,
    reflections_of,
    rotation_of,
)
from isotune.algebra.skew import skew_size


def rotations(count: int, n: int) -> Tensor:
    found = torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64)).Q
    found[..., 0] *= torch.det(found).sign()[:, None]
    return found


def product_of(directions: Tensor) -> Tensor:
    left, right = reflections(directions.double())
    return torch.eye(directions.shape[1], dtype=torch.float64) + left @ right


@given(n=st.integers(1, 9), count=st.integers(1, 3))
def test_the_generator_of_a_rotation_gives_it_back(n: int, count: int) -> None:
    given_rotations = rotations(count, n)
    entries = generator_of(given_rotations)
    assert entries.shape == (count, skew_size(n))
    # Of an angle near half a turn only the rounding of R is known.
    limit = max(1e-9, 1e-14 * float(entries.norm()))
    assert float((rotation_of(entries) - given_rotations).abs().max()) < limit


@pytest.mark.parametrize("signs", [[-1, -1, 1, 1, 1], [-1, -1, -1, -1], [-1, -1]])
def test_half_a_turn_becomes_the_farthest_that_a_generator_turns(signs: list[float]) -> None:
    (turn,) = rotations(1, len(signs))
    half = turn @ torch.diag(torch.tensor(signs, dtype=torch.float64)) @ turn.T
    found = rotation_of(generator_of(half))
    # Each plane lacks π − 2 arctan t, so its rotation differs by √2 of twice the sine of half of that.
    planes = sum(sign < 0 for sign in signs) / 2
    expected = (8 * planes / (1 + LARGEST_TANGENT**2)) ** 0.5
    assert float((found - half).norm()) == pytest.approx(expected, rel=1e-6)


@given(n=st.integers(2, 6), rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_no_other_rotation_is_nearer(n: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, target = torch.randn(2, rows, n, dtype=torch.float64)
    found = nearest_rotation(target.T @ weight)
    torch.testing.assert_close(found.T @ found, torch.eye(n, dtype=torch.float64))
    assert float(torch.det(found)) == pytest.approx(1.0)
    least = float((target - weight @ found.T).norm())
    small = rotation_of(torch.randn(40, skew_size(n)) * torch.tensor([1e-3, 1e-1, 1.0, 10.0]).repeat(10)[:, None])
    others = torch.cat([small @ found, rotations(40, n)])
    assert all(float((target - weight @ other.T).norm()) > least - 1e-6 for other in others)


def test_what_the_weight_does_not_see_stays() -> None:
    weight = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(nearest_rotation(weight.T @ weight), torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(
        nearest_rotation(torch.zeros(2, 4, 4)), torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    )


@given(n=st.integers(1, 7), pairs=st.integers(1, 4), std=st.floats(1e-6, 3.0))
def test_reflections_make_the_rotation_or_its_farthest_planes(n: int, pairs: int, std: float) -> None:
    entries = torch.randn(skew_size(n), dtype=torch.float64) * std
    directions, missing, norm = reflections_of(entries, 2 * pairs)
    assert directions.shape == (2 * pairs, n)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2 * pairs, dtype=torch.float64))
    rotation, found = rotation_of(entries), product_of(directions)
    assert float((rotation - found).norm()) == pytest.approx(missing, abs=1e-9)
    assert float((rotation - torch.eye(n, dtype=torch.float64)).norm()) == pytest.approx(norm, abs=1e-9)
    if 2 * pairs >= n:
        assert missing == 0.0


def test_no_other_reflections_are_nearer() -> None:
    entries = torch.randn(skew_size(6), dtype=torch.float64)
    directions, missing, _ = reflections_of(entries, 2)
    rotation, best = rotation_of(entries), missing
    for start in (directions + 0.1 * torch.randn(2, 6), *torch.randn(6, 2, 6)):
        moved = start.double().requires_grad_()
        search = torch.optim.LBFGS([moved], max_iter=200, line_search_fn="strong_wolfe")

        def loss(moved: Tensor = moved) -> Tensor:
            left, right = reflections(moved)
            value = (rotation - torch.eye(6, dtype=torch.float64) - left @ right).square().sum()
            moved.grad = torch.autograd.grad(value, moved)[0]
            return value

        search.step(loss)
        best = min(best, float((rotation - product_of(moved.detach())).norm()))
    assert best > missing - 1e-6
