"""Frozen random matrices that follow from a few numbers, and whose rows are re-initialised one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

_MADE: WeakValueDictionary[tuple[RandomRows, torch.dtype, torch.device], Tensor] = WeakValueDictionary()
"""The matrices in use, so that all who ask for one share its memory."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RandomRows:
    """What a frozen random matrix (rank, width) follows from: the same numbers, up to rounding, wherever it is made.

    It starts orthonormal, its rows if there are no more of them than columns, else its columns, and uniformly
    distributed: the orthonormal factor of a Gaussian matrix. A row is re-initialised by interpolation,
    row ← (1 − w) row + w q, where q is distributed as a row of such a matrix. All random numbers come from numpy's
    `RandomState`, whose stream is frozen, and those of q depend on the seed, the row and how often it was
    re-initialised alone; so `counts` and w stand for the whole history.

    Source: Mezzadri, How to generate random matrices from the classical compact groups (2007), section 5, for the
        uniform distribution. A row of such a matrix is, in its distribution, a part of a Gaussian vector of length one.
    """

    seed: int
    """At least 0 and below 2³²."""
    part: int
    """Which of several matrices of one seed and shape."""
    rank: int
    width: int
    counts: tuple[int, ...] = ()
    """How many times each row has been re-initialised; empty if none has."""
    weight: float = 0.0
    """w; 0 if no row has been re-initialised."""

    @classmethod
    def of(cls, seed: int, part: int, rank: int, width: int, counts: Iterable[float], weight: float) -> RandomRows:
        """The matrix after so many re-initialisations of each row."""
        plain, numbers = cls(seed, part, rank, width), tuple(map(int, counts))
        return replace(plain, counts=numbers, weight=weight) if any(numbers) else plain

    def matrix(self, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Tensor:
        """The matrix, (rank, width), shared with all who hold it; its values are rounded to float32 first."""
        found = _MADE.get((self, dtype, device))
        if found is None:
            # Not in inference mode, whose tensors a later pass with gradients could not save for backward.
            with torch.inference_mode(False), torch.no_grad():
                alone = dtype == torch.float32 and device.type == "cpu"
                found = self._made() if alone else self.matrix().to(device, dtype)
            _MADE[self, dtype, device] = found
        return found

    def reinitialised(self, rows: Iterable[int], weight: float) -> tuple[RandomRows, Tensor]:
        """The matrix after these rows are re-initialised once more.

        Args:
            rows: indices of rows.
            weight: w, in (0, 1]; that of earlier re-initialisations, if there were any.

        Returns:
            What it follows from, and the float32 matrix on the CPU, which is shared as long as it is held.
        """
        chosen = set(rows)
        before = self.counts or (0,) * self.rank
        after = RandomRows.of(
            *(self.seed, self.part, self.rank, self.width),
            [count + (row in chosen) for row, count in enumerate(before)],
            weight,
        )
        found = _MADE.get((after, torch.float32, _CPU))
        if found is None:
            found = self.matrix().clone()
            for row in chosen:
                found[row] = after._interpolated(found[row], row, after.counts[row])
            _MADE[after, torch.float32, _CPU] = found
        return after, found

    def _made(self) -> Tensor:
        tall = self.rank > self.width
        drawn = torch.from_numpy(self._stream().standard_normal((self.rank, self.width)))
        factor, upper = torch.linalg.qr(drawn if tall else drawn.T)
        # With R's diagonal made positive, the factor is unique, and uniformly distributed.
        factor = factor * upper.diagonal().sign()
        found: Tensor = (factor if tall else factor.T).float().contiguous()
        for row, count in enumerate(self.counts):
            for number in range(1, count + 1):
                found[row] = self._interpolated(found[row], row, number)
        return found

    def _interpolated(self, old: Tensor, row: int, number: int) -> Tensor:
        """A row after its re-initialisation of this number, counted from 1; rounded each time, as it is stored."""
        drawn = self._stream(row, number).standard_normal(max(self.rank, self.width))
        new = torch.from_numpy(drawn[: self.width] / np.linalg.norm(drawn))
        mixed: Tensor = (1.0 - self.weight) * old.double() + self.weight * new
        return mixed.float()

    def _stream(self, *place: int) -> np.random.RandomState:
        return np.random.RandomState([self.seed, self.part, *place])
