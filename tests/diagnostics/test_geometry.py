"""Diagnostics against cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from isotune.diagnostics import geometry


def rotation(*degrees: float) -> torch.Tensor:
    blocks = [
        torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
        for a in map(math.radians, degrees)
    ]
    basis = torch.linalg.qr(torch.randn(2 * len(blocks), 2 * len(blocks), dtype=torch.float64)).Q
    return basis @ torch.block_diag(*blocks) @ basis.T


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_orthogonality_error_is_the_largest_entry() -> None:
    matrix = rotation(30, 70)
    assert geometry.orthogonality_error(matrix) < 1e-14
    assert geometry.orthogonality_error(1.1 * matrix) == pytest.approx(0.21)
    assert geometry.orthogonality_error(matrix.float()) < 1e-6


def test_rotation_angles_are_those_of_the_planes() -> None:
    angles = geometry.rotation_angles(rotation(10, 120, 45))
    assert angles.rad2deg().tolist() == pytest.approx([120, 120, 45, 45, 10, 10])
    assert geometry.rotation_angles(torch.eye(3)).tolist() == [0, 0, 0]
    assert float(geometry.rotation_angles(rotation(1e-5)).max()) == pytest.approx(math.radians(1e-5), rel=1e-6)


def test_angles_and_norms_are_kept_by_an_orthogonal_map_and_moved_by_another() -> None:
    rows = torch.randn(20, 6, dtype=torch.float64)
    turned = rows @ rotation(50, 20, 80)
    assert geometry.angle_change(rows, turned).largest < 1e-7
    assert geometry.norm_change(rows, turned).largest < 1e-12
    assert geometry.angle_change(rows, 3 * rows).largest < 1e-7
    assert geometry.norm_change(rows, 3 * rows) == pytest.approx((2.0, 2.0))
    before, after = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert geometry.angle_change(before, after) == pytest.approx((math.pi / 4, math.pi / 4))


def test_mean_is_over_pairs_without_the_diagonal() -> None:
    before = torch.eye(3)
    after = torch.tensor([[1.0, 0, 0], [1.0, 1, 0], [0, 0, 1]])
    assert geometry.angle_change(before, after) == pytest.approx((math.pi / 4, math.pi / 12))


def test_many_rows_are_sampled_alike_each_time_and_from_end_to_end() -> None:
    before = torch.randn(14336, 4)
    after = before + 0.1 * torch.randn(14336, 4)
    first = geometry.angle_change(before, after, max_rows=64)
    torch.manual_seed(5)
    assert geometry.angle_change(before, after, max_rows=64) == first
    assert first.mean == pytest.approx(geometry.angle_change(before, after, max_rows=512).mean, rel=0.3)
    moved = before.clone()
    moved[-1] = torch.tensor([0.0, 0, 0, 1]) + moved[-1].roll(1)
    assert geometry.angle_change(before, moved, max_rows=64).largest > 0.1


def test_zero_rows_have_no_angle() -> None:
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    after = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert geometry.angle_change(before, after) == (0.0, 0.0)
    assert geometry.norm_change(before, after) == (0.0, 0.0)
    assert geometry.angle_change(torch.zeros(3, 2), after) == (0.0, 0.0)


def test_energy_is_the_share_of_squared_singular_values() -> None:
    weight = torch.randn(9, 5)
    _, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = float(values[:2].square().sum() / values.square().sum())
    assert geometry.energy_captured(weight, right[:2]) == pytest.approx(expected, rel=1e-5)
    assert geometry.energy_captured(weight.bfloat16(), right[:2]) == pytest.approx(expected, rel=1e-2)
    assert geometry.energy_captured(torch.zeros(3, 4), torch.eye(4)[:2]) == 1.0


@pytest.mark.parametrize(("out", "inner", "width"), [(12, 3, 7), (2, 5, 9), (9, 5, 2)])
def test_factored_singular_values_are_those_of_the_product(out: int, inner: int, width: int) -> None:
    up, down = torch.randn(out, inner, dtype=torch.float64), torch.randn(inner, width, dtype=torch.float64)
    count = min(out, inner, width)
    found, expected = geometry.factored_singular_values(up, down), torch.linalg.svdvals(up @ down)
    assert found.shape == (count,)
    torch.testing.assert_close(found, expected[:count])


def test_ranks_of_known_spectra() -> None:
    assert geometry.stable_rank(torch.ones(5)) == pytest.approx(5)
    assert geometry.entropy_rank(torch.ones(5)) == pytest.approx(5)
    assert geometry.stable_rank(torch.tensor([2.0, 1.0, 0.0])) == pytest.approx(1.25)
    # p = (0.8, 0.2): squared singular values, where Roy and Vetterli would have (2/3, 1/3).
    expected = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert geometry.entropy_rank(torch.tensor([2.0, 1.0, 0.0])) == pytest.approx(expected)
    assert geometry.stable_rank(torch.zeros(3)) == geometry.entropy_rank(torch.zeros(3)) == 0.0


def test_refused_shapes() -> None:
    with pytest.raises(ValueError, match="equally many rows"):
        geometry.angle_change(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="equally many rows"):
        geometry.norm_change(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="at least 2"):
        geometry.angle_change(torch.zeros(3, 2), torch.zeros(3, 2), max_rows=1)
