"""Which weights of one call are equal, without a copy of them on the CPU and without a hash of their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.subspace.precision import rows_in_parts
from isotune.subspace.result import Subspace, SubspaceRequest

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Key = tuple[int, torch.Size, torch.dtype, torch.device, int]


class EqualWeights:
    """The subspaces found so far, looked up by the weight itself.

    Weights count as equal if their shapes, dtypes, devices and bits are. A sum of the bits as integers, computed where
    the weight is, says of nearly all pairs that they differ; bits are compared only where it agrees.
    """

    def __init__(self) -> None:
        self._found: dict[_Key, list[tuple[SubspaceRequest, Subspace]]] = {}

    def find(self, weight: Tensor, rank: int) -> tuple[_Key, Subspace | None]:
        """The key to `add` this weight under, and the subspace of this rank of an equal one, if there was one."""
        key = (checksum(weight), weight.shape, weight.dtype, weight.device, rank)
        for request, subspace in self._found.get(key, ()):
            # An earlier one that was made for its turn has been dropped since, and is made again.
            other = request.weight if isinstance(request.weight, Tensor) else request.weight()
            if _same_memory(weight, other) or torch.equal(_bits(weight), _bits(other)):
                return key, subspace
        return key, None

    def add(self, key: _Key, request: SubspaceRequest, subspace: Subspace) -> None:
        """Keep what was found for a weight."""
        self._found.setdefault(key, []).append((request, subspace))


def checksum(weight: Tensor) -> int:
    """Sum the bits of a weight (out, in) as integers, whatever its layout: exact, and one wait for its device."""
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for part in rows_in_parts(_bits(weight)):
        total += part.sum(dtype=torch.int64)
    return int(total)


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view(_INTEGERS[weight.element_size()])


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
