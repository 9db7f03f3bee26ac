"""Truncations are the best ones, and say what they leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from isotune.subspace import lowrank
from isotune.subspace.lowrank import pad_rank, truncate, truncate_product


def decaying(rows: int, columns: int, rate: float = 0.7) -> Tensor:
    """A matrix with singular values 1, rate, rate², …"""
    left, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), dtype=torch.float64))
    return (left * rate ** torch.arange(min(rows, columns)).double()) @ right.T


def best_error(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum()) ** 0.5


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 9), (700, 900)])
@pytest.mark.parametrize("rank", [1, 5, 20, 100])
def test_a_rank_gives_the_best_error(shape: tuple[int, int], rank: int) -> None:
    matrix = decaying(*shape).float()
    found = truncate(matrix, rank=rank)
    kept = min(rank, *shape)
    assert found.up.shape == (shape[0], kept)
    assert found.down.shape == (kept, shape[1])
    assert found.missing == pytest.approx(float((matrix - found.up @ found.down).double().norm()), abs=1e-6)
    assert found.missing <= best_error(matrix, kept) * (1 + 1e-4) + 5e-6  # of which the last is float32
    assert found.norm == pytest.approx(float(matrix.double().norm()))
    torch.testing.assert_close(found.down @ found.down.T, torch.eye(kept), rtol=0, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize(("shape", "rate"), [((40, 60), 0.7), ((300, 200), 0.97)])
@pytest.mark.parametrize("small", [True, False], ids=["at-once", "guess-by-guess"])
def test_an_energy_gives_the_least_rank(
    energy: float, shape: tuple[int, int], rate: float, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(lowrank, "_SMALL", 0)
        monkeypatch.setattr(lowrank, "_FIRST_GUESS", 4)
    matrix = decaying(*shape, rate)
    found = truncate(matrix, energy=energy)
    shares = torch.linalg.svdvals(matrix).square().cumsum(0) / matrix.square().sum()
    assert len(found.down) == int((shares < energy).sum()) + 1
    assert found.missing**2 <= (1 - energy) * found.norm**2 * (1 + 1e-9)


def test_a_zero_update_is_zeros_of_rank_one() -> None:
    for found in (
        truncate(torch.zeros(5, 7), energy=0.9),
        truncate(torch.zeros(5, 7), rank=3),
        truncate_product(torch.zeros(5, 2), torch.randn(2, 7), energy=0.9),
    ):
        assert found.up.shape == (5, 1)
        assert found.down.shape == (1, 7)
        assert not found.up.any()
        assert (found.missing, found.norm) == (0.0, 0.0)


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.95}])
def test_of_a_product_it_is_that_of_the_matrix(options: dict[str, Any]) -> None:
    up, down = torch.randn(30, 8) * 0.5 ** torch.arange(8), torch.randn(8, 20)
    found, whole = truncate_product(up, down, **options), truncate(up @ down, **options)
    assert found.down.shape == whole.down.shape
    torch.testing.assert_close(found.up @ found.down, whole.up @ whole.down, rtol=1e-3, atol=1e-4)
    assert found.missing == pytest.approx(whole.missing, rel=1e-4)
    assert found.norm == pytest.approx(whole.norm)


def test_a_product_within_the_rank_stays_as_it_is() -> None:
    up, down = torch.randn(6, 4), torch.randn(4, 9)
    for options in ({}, {"rank": 4}, {"rank": 50}):
        found = truncate_product(up, down, **options)
        assert found.up is up
        assert found.down is down
        assert found.missing == 0.0


def test_padding_changes_nothing() -> None:
    up, down = torch.randn(6, 2), torch.randn(2, 9)
    wide_up, wide_down = pad_rank(up, down, 5)
    assert wide_up.shape == (6, 5)
    assert wide_down.shape == (5, 9)
    torch.testing.assert_close(wide_up @ wide_down, up @ down)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Neither rank nor energy"),
        ({"rank": 3, "energy": 0.5}, "both given"),
        ({"rank": 0}, "at least 1"),
        ({"rank": True}, "at least 1"),
        ({"energy": 1.0}, "below 1"),
        ({"energy": 0.0}, "above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncate(torch.eye(3), **options)
