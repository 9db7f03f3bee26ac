"""Finding equal weights within one call, without copying them to the CPU or hashing their bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from isotune.subspace.precision import rows_in_parts
from isotune.subspace.result import Subspace, SubspaceRequest

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EqualWeights:
    """The subspaces found so far, looked up by the weight itself.

    Weights are equal if their shapes, dtypes, devices and bits are. The sum of their bits as integers, computed on
    their own device, tells nearly all different pairs apart; bits are only compared if the sums agree.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, list[tuple[SubspaceRequest, Subspace]]] = {}

    def subspace(
        self, weight: Tensor, request: SubspaceRequest, solve: Callable[[Tensor, SubspaceRequest], Subspace]
    ) -> Subspace:
        """The subspace of an equal weight at the same rank and places, or else the one that `solve` finds."""
        key = (checksum(weight), weight.shape, weight.dtype, weight.device, request.rank, request.places)
        known = self._found.setdefault(key, [])
        for earlier, subspace in known:
            # An earlier weight that was made by a function has been dropped since, and is made again.
            other = earlier.weight if isinstance(earlier.weight, Tensor) else earlier.weight()
            if _same_memory(weight, other) or torch.equal(_bits(weight), _bits(other)):
                return subspace
        known.append((request, solve(weight, request)))
        return known[-1][1]


def checksum(weight: Tensor) -> int:
    """The sum of a weight's bits as integers, (out, in) in any layout; exact, with one wait for its device."""
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for part in rows_in_parts(_bits(weight)):
        total += part.sum(dtype=torch.int64)
    return int(total)


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view(_INTEGERS[weight.element_size()])


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
