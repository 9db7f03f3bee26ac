"""GOFT and qGOFT: the tree of rotations by the definition at any width, and the penalty of the free pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import layers_of, trainable
from isotune.methods import METHODS, GOFTConfig, QGOFTConfig
from isotune.methods.goft import GOFTOperator, QGOFTOperator
from rotation_checks import assert_is, assert_orthogonal, assert_penalty_is, bare, fill, fillings, orthogonality_error

WIDTHS = [2, 3, 4, 5, 7, 8, 31, 32, 33, 34, 65, 97]


def tree(matrices: Tensor, n: int) -> Tensor:
    """P_L ⋯ P₂ P₁ as whole matrices; level l turns the pairs (i, i + 2^(l−1)), i = 0, 2^l, 2 · 2^l, …"""
    product, used, stride = torch.eye(n, dtype=matrices.dtype), 0, 1
    while stride < n:
        level = torch.eye(n, dtype=matrices.dtype)
        for first in range(0, n - stride, 2 * stride):
            index = torch.tensor([first, first + stride])
            level = level.index_put((index[:, None], index[None, :]), matrices[used])
            used += 1
        product = level @ product
        stride *= 2
    assert used == len(matrices)
    return product


def rotations(angles: Tensor) -> Tensor:
    """[[cos, −sin], [sin, cos]] of each angle."""
    rows = [torch.stack([torch.cos(a), -torch.sin(a), torch.sin(a), torch.cos(a)]).view(2, 2) for a in angles]
    return torch.stack(rows)


@pytest.mark.parametrize("n", WIDTHS)
def test_goft_is_the_definition(n: int) -> None:
    operator = GOFTOperator(n).double()
    assert operator.angles.shape == (n - 1,)
    assert torch.equal(operator.matrix(), torch.eye(n).double())
    assert operator.is_identity()
    operator.randomize_parameters()
    assert not operator.is_identity()
    assert_is(operator, lambda: tree(rotations(operator.angles), n))


@pytest.mark.parametrize("n", WIDTHS)
def test_qgoft_is_the_definition(n: int) -> None:
    operator = QGOFTOperator(n).double()
    assert operator.pairs.shape == (n - 1, 2, 2)
    assert torch.equal(operator.matrix(), torch.eye(n).double())
    assert operator.is_identity()
    fill(operator, "uniform", 0.3, seed=2)
    assert not operator.is_identity()
    assert not operator.orthogonal
    assert orthogonality_error(operator.matrix()) > 1e-2
    assert_is(operator, lambda: tree(operator.pairs + torch.eye(2), n))


@pytest.mark.parametrize("n", WIDTHS)
def test_qgoft_is_goft_where_its_pairs_are_rotations(n: int) -> None:
    strict, free = GOFTOperator(n).double(), QGOFTOperator(n).double()
    strict.randomize_parameters()
    with torch.no_grad():
        free.pairs.copy_(rotations(strict.angles) - torch.eye(2))
    torch.testing.assert_close(free.matrix(), strict.matrix(), rtol=0, atol=1e-14)


@given(filling=fillings(), n=st.integers(2, 140))
def test_exactly_orthogonal(filling: tuple[str, float, int], n: int) -> None:
    operator = GOFTOperator(n)
    fill(operator, *filling)
    assert_orthogonal(operator)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1e-3, 1.0, 1e2, 1e4, 1e7, 1e12, 1e30])
@pytest.mark.parametrize("n", [6, 33, 300])
def test_orthogonal_at_angles_of_any_size(n: int, magnitude: float) -> None:
    operator = GOFTOperator(n)
    fill(operator, "uniform", magnitude, seed=n)
    assert_orthogonal(operator, tolerance=2e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_small_angles_keep_their_relative_precision(size: float) -> None:
    """cos θ − 1 must not be formed from a cosine that has been rounded next to one."""
    operator = GOFTOperator(2)
    with torch.no_grad():
        operator.angles.fill_(size)
    (difference,) = operator.tensors()
    expected = torch.tensor([size], dtype=torch.float32).double().cos() - 1
    # 1 − cos θ itself would be lost to rounding in float64 at 1e-6; its series is θ²/2 to 1e-12 of that.
    expected = expected if size > 1e-5 else -0.5 * torch.tensor([size]).double().square()
    torch.testing.assert_close(difference[0, 0, 0].detach().double(), expected[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["goft", "qgoft"])
@pytest.mark.parametrize("n", [2, 3, 37, 64, 1000])
def test_parameters_for_any_width(method: str, n: int) -> None:
    model = bare(METHODS[method](), n)
    assert sum(p.numel() for p in trainable(model).values()) == (n - 1 if method == "goft" else 4 * (n - 1))


@pytest.mark.parametrize("n", [2, 5, 33, 70])
def test_every_angle_is_trained_from_the_start(n: int) -> None:
    operator = GOFTOperator(n).double()
    (gradient,) = torch.autograd.grad((operator.matrix() * torch.randn(n, n).double()).sum(), operator.angles)
    assert bool((gradient != 0).all())


# -- the penalty ---------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_columns_inner_product() -> None:
    operator = QGOFTConfig(regularizer_weight=0.05).build_operator("m", 7, 3)
    fill(operator, "uniform", 0.4, seed=1)
    expected = torch.zeros(())
    for pair in operator.pairs:
        (a1, b1), (a2, b2) = pair + torch.eye(2)
        expected = expected + 0.05 * (a1 * b1 + a2 * b2) ** 2
    assert_penalty_is(operator, expected)


def test_the_penalty_is_none_for_rotations_and_for_lengths() -> None:
    operator = QGOFTOperator(20, regularizer_weight=1.0)
    assert float(operator.penalty().detach()) == 0.0  # type: ignore[union-attr]
    with torch.no_grad():
        operator.pairs.copy_(rotations(torch.randn(19)) * torch.tensor([0.5, 3.0]) - torch.eye(2))
    assert float(operator.penalty().detach()) < 1e-10  # type: ignore[union-attr]
    with torch.no_grad():
        operator.pairs[4, 0, 1] += 0.5
    assert float(operator.penalty().detach()) > 1e-3  # type: ignore[union-attr]


def test_the_weight_scales_the_penalty_and_none_of_it_is_none() -> None:
    penalties = {}
    for weight in (0.0, 1e-3, 0.01):
        operator = QGOFTConfig(regularizer_weight=weight).build_operator("m", 9, 3)
        fill(operator, "uniform", 0.4, seed=1)
        penalties[weight] = operator.penalty()
    assert penalties[0.0] is None
    torch.testing.assert_close(penalties[0.01], 10 * penalties[1e-3])
    default = QGOFTConfig().build_operator("m", 9, 3)
    fill(default, "uniform", 0.4, seed=1)
    torch.testing.assert_close(default.penalty(), penalties[1e-3])
    assert GOFTOperator(5).penalty() is None


def test_descending_the_penalty_makes_the_columns_orthogonal() -> None:
    operator = layers_of(bare(QGOFTConfig(regularizer_weight=1.0), 12))[0].adapter("default")
    fill(operator, "uniform", 0.4, seed=1)
    optimizer = torch.optim.SGD(operator.parameters(), lr=0.1)
    start = float(operator.penalty().detach())
    for _ in range(100):
        optimizer.zero_grad()
        operator.penalty().backward()
        optimizer.step()
    assert float(operator.penalty().detach()) < 1e-4 * start


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GOFTConfig, QGOFTConfig])
def test_one_input_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=r"'layers\.0' has one input, which cannot be rotated"):
        bare(config(), 1)


@pytest.mark.parametrize("weight", [-1e-3, float("nan"), float("inf")])
def test_weights_without_meaning_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=f"regularizer_weight={weight} is not allowed; .*at least 0"):
        QGOFTConfig(regularizer_weight=weight)
