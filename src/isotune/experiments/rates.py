"""Which learning rates a method is tried at: given ones, or a search that goes on until the best lies inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

MOST_RUNS = 8
"""How many rates a search that widens may try, where nothing else is said."""

LEAST_FACTOR = 1.5
"""The least distance of the rates of a search that widens: rounded to two digits, closer ones would fall together."""


def at_border(lr: float | None, tried: Iterable[float]) -> bool:
    """Whether the best rate is the lowest or highest of those tried, so that a better one may lie beyond.

    Of fewer than three rates none lies inside, and being at the border says nothing.
    """
    rates = sorted(set(tried))
    return len(rates) > 2 and lr in (rates[0], rates[-1])


def best_of(merits: Mapping[float, float], tried: Iterable[float]) -> float:
    """The best of some rates; of equally good ones that nearest to the middle of those tried, and then the lower.

    Args:
        merits: how good each rate was, the more the better.
        tried: those and, where there are some, those that came to nothing.
    """
    logarithms = [math.log(rate) for rate in tried]
    middle = (min(logarithms) + max(logarithms)) / 2
    return min(merits, key=lambda rate: (-merits[rate], round(abs(math.log(rate) - middle), 6), rate))


def grid(centre: float, count: int, factor: float) -> tuple[float, ...]:
    """`count` learning rates `factor` apart, with `centre` in the middle; the others rounded to two digits."""
    powers = (i - (count - 1) / 2 for i in range(count))
    return tuple(_rounded(centre * factor**power) if power else centre for power in powers)


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


class Search(Protocol):
    """How the learning rate of a method is found."""

    @property
    def runs(self) -> int:
        """How many rates it may try."""

    @property
    def described(self) -> str:
        """The search in words, for a record."""

    def stages(self, merit: Callable[[float], float | None]) -> Iterator[tuple[float, ...]]:
        """The rates to try, stage after stage, as far as they follow from what is known.

        Args:
            merit: how good the run at a rate was, the more the better: minus infinity where it came to nothing, None
                while it has not ended. A stage is the last one while one of its rates has none.
        """


@dataclass(frozen=True)
class Given:
    """These rates and no others."""

    rates: tuple[float, ...]

    @property
    def runs(self) -> int:
        return len(self.rates)

    @property
    def described(self) -> str:
        return f"the best of {', '.join(f'{rate:g}' for rate in self.rates)}"

    def stages(self, merit: Callable[[float], float | None]) -> Iterator[tuple[float, ...]]:
        yield self.rates


@dataclass(frozen=True)
class Widening:
    """Three rates, more beyond the end at which the best lies, and at last one on either side of the best.

    The three are `factor` apart, as is each that widens; the last two are the square root of `factor` from the best.
    The search is over once rates on both sides of the best have been tried at that distance, or after `runs` rates.
    Where all came to nothing it goes down, since a rate is more often too high than too low.
    """

    centre: float
    factor: float
    runs: int = MOST_RUNS

    @property
    def described(self) -> str:
        return (
            f"rates {self.factor:g} apart around {self.centre:g}, widened until the best lies inside, then one on "
            f"either side of it; at most {self.runs} runs"
        )

    def stages(self, merit: Callable[[float], float | None]) -> Iterator[tuple[float, ...]]:
        lower, middle, upper = grid(self.centre, 3, self.factor)
        stage: tuple[float, ...] = (middle, lower, upper)
        tried: dict[float, float] = {}
        while stage:
            yield stage
            for rate in stage:
                found = merit(rate)
                if found is None:
                    return
                tried[rate] = found
            stage = self._following(tried)[: self.runs - len(tried)]

    def _following(self, tried: dict[float, float]) -> tuple[float, ...]:
        best = best_of(tried, tried)
        if tried[best] == -math.inf:
            return (_rounded(min(tried) / self.factor),)
        if at_border(best, tried):
            return (_rounded(best * self.factor if best == max(tried) else best / self.factor),)
        root = math.sqrt(self.factor)
        beside = (_rounded(best / root), _rounded(best * root))
        # Rounding moves a rate by up to 5 %, which makes it no other one.
        return tuple(new for new in beside if all(abs(math.log(new / old)) > math.log(root) / 2 for old in tried))
