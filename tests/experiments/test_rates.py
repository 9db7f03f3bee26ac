"""Searches of a learning rate: which rates are tried, in which order, and when they end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotune.experiments.rates import Given, Widening, at_border, best_of, grid


def carried_out(search: Widening, merit: Callable[[float], float]) -> list[tuple[float, ...]]:
    return list(search.stages(merit))


def peak(best: float) -> Callable[[float], float]:
    """A merit that falls on both sides of a rate."""
    return lambda rate: -abs(math.log(rate / best))


def test_the_grid_lies_around_its_middle() -> None:
    assert grid(1.25e-3, 1, 2.5) == (1.25e-3,)
    assert grid(1e-3, 3, 2.5) == (4e-4, 1e-3, 2.5e-3)
    lower, upper = grid(1e-3, 2, 4.0)
    assert lower * upper == pytest.approx(1e-6, rel=0.05)


def test_given_rates_are_one_stage() -> None:
    assert list(Given((1e-3, 2e-3)).stages(lambda rate: 0.0)) == [(1e-3, 2e-3)]


def test_a_search_around_the_best_ends_after_its_neighbours() -> None:
    assert carried_out(Widening(1e-3, 2.5), peak(1e-3)) == [(1e-3, 4e-4, 2.5e-3), (6.3e-4, 1.6e-3)]


def test_a_search_widens_until_the_best_lies_inside() -> None:
    up = carried_out(Widening(1e-3, 2.5), peak(6e-3))
    assert up == [(1e-3, 4e-4, 2.5e-3), (6.3e-3,), (0.016,), (0.004, 0.01)]
    down = carried_out(Widening(1e-3, 2.5), peak(1.6e-4))
    assert down == [(1e-3, 4e-4, 2.5e-3), (1.6e-4,), (6.4e-5,), (1e-4, 2.5e-4)]


def test_of_equally_good_rates_the_usual_one_is_the_best() -> None:
    assert carried_out(Widening(1e-3, 2.5), lambda rate: 0.5) == [(1e-3, 4e-4, 2.5e-3), (6.3e-4, 1.6e-3)]


@pytest.mark.parametrize("order", itertools.permutations((4e-5, 1e-4, 2.5e-4)))
def test_of_equally_good_rates_the_order_decides_nothing(order: tuple[float, ...]) -> None:
    ends = {rate: 0.2 if rate == 1e-4 else 0.5 for rate in order}
    assert best_of(ends, order) == 4e-5
    assert best_of(dict.fromkeys(order, 0.5), order) == 1e-4
    assert best_of({rate: rate for rate in order if rate < 2e-4}, order) == 1e-4


def test_where_all_fail_the_search_goes_down() -> None:
    found = carried_out(Widening(1e-3, 2.5), lambda rate: peak(1.3e-4)(rate) if rate < 2e-4 else -math.inf)
    assert found == [(1e-3, 4e-4, 2.5e-3), (1.6e-4,), (6.4e-5,), (1e-4, 2.5e-4)]


def test_a_search_waits_for_the_whole_stage() -> None:
    known = {1e-3: 0.5, 4e-4: 0.6}
    assert list(Widening(1e-3, 2.5).stages(known.get)) == [(1e-3, 4e-4, 2.5e-3)]
    known[2.5e-3] = 0.1
    assert list(Widening(1e-3, 2.5).stages(known.get)) == [(1e-3, 4e-4, 2.5e-3), (1.6e-4,)]


@given(
    centre=st.floats(1e-6, 1.0),
    factor=st.floats(1.5, 10.0),
    off=st.floats(-4, 4),
    runs=st.integers(3, 12),
)
def test_a_search_ends_inside_or_at_its_limit(centre: float, factor: float, off: float, runs: int) -> None:
    best = centre * factor**off
    stages = carried_out(Widening(centre, factor, runs), peak(best))
    tried = [rate for stage in stages for rate in stage]
    assert len(tried) == len(set(tried)) <= runs
    chosen = max(tried, key=peak(best))
    if len(tried) < runs:
        assert not at_border(chosen, tried)
        below, above = (min(abs(math.log(r / chosen)) for r in tried if (r > chosen) is up) for up in (False, True))
        assert max(below, above) < 0.8 * math.log(factor) + 0.11  # closer than a step of the search, but for rounding
