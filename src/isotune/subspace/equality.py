"""Finding equal weights within one call, without copying them to the CPU or hashing their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.subspace.precision import rows_in_parts
from isotune.subspace.result import Subspace, SubspaceRequest

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Key = tuple[int, torch.Size, torch.dtype, torch.device, int, tuple[int, ...] | None]


class EqualWeights:
    """The subspaces found so far, looked up by the weight itself.

    Weights are equal if their shapes, dtypes, devices and bits are. The sum of their bits as integers, computed on
    their own device, tells nearly all different pairs apart; bits are only compared if the sums agree.
    """

    def __init__(self) -> None:
        self._found: dict[_Key, list[tuple[SubspaceRequest, Subspace]]] = {}

    def find(self, weight: Tensor, rank: int, places: tuple[int, ...] | None = None) -> tuple[_Key, Subspace | None]:
        """The key under which to `add` this weight, and the subspace of an equal weight at rank and places, or None."""
        key = (checksum(weight), weight.shape, weight.dtype, weight.device, rank, places)
        for request, subspace in self._found.get(key, ()):
            # An earlier weight that was made by a function has been dropped since, and is made again.
            other = request.weight if isinstance(request.weight, Tensor) else request.weight()
            if _same_memory(weight, other) or torch.equal(_bits(weight), _bits(other)):
                return key, subspace
        return key, None

    def add(self, key: _Key, request: SubspaceRequest, subspace: Subspace) -> None:
        """Record the subspace of a weight."""
        self._found.setdefault(key, []).append((request, subspace))


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
