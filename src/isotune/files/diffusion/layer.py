"""One layer that a single file adapts, and the options that isotune's configuration derives from all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isotune.errors import AdapterFileError
from isotune.files.adapter import by_module
from isotune.hosts import widen

Parameters = dict[str, dict[str, Tensor]]
"""Module name -> the parameters of its operator."""


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted layer: its tensors in the file, and its module's weight."""

    name: str
    prefix: str
    """The prefix of its name in the file."""
    weight: Tensor
    """The weight in the module's own layout."""
    tensors: Mapping[str, Tensor]
    where: str

    @property
    def width(self) -> int:
        """in_features of W, including a convolution's kernel."""
        return math.prod(self.weight.shape[1:])

    @property
    def outputs(self) -> int:
        """out_features of W."""
        return len(self.weight)

    @property
    def sign(self) -> int:
        """Sign of the generator relative to a linear layer's: these tools rotate a linear layer's inputs, x R, which
        gives W Rᵀ, but a convolution's flattened kernels themselves, W R."""
        return 1 if self.weight.ndim == 2 else -1

    def refuse(self, reason: str) -> AdapterFileError:
        return AdapterFileError(f"{self.where}: {self.name!r}: {reason}")

    def tensor(self, key: str, dimensions: int) -> Tensor:
        """One of its tensors, at least float32; refused if missing or of another number of dimensions."""
        tensor = self.tensors.get(key)
        if tensor is None or tensor.ndim != dimensions:
            found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
            raise self.refuse(f"it needs a tensor {key} of {dimensions} dimensions, and the file holds {found}.")
        return widen(tensor)


def block_options(layers: list[AdaptedModule], sizes: Mapping[str, int], side: str) -> dict[str, Any]:
    """Options that give isotune's OFT blocks of these sizes, by module: one number of blocks, or sizes."""
    counts = {(x.outputs if side == "output" else x.width) // sizes[x.name] for x in layers}
    if len(counts) == 1 < len(set(sizes.values())):
        return {"r": counts.pop()}
    return by_module("oft_block_size", "block_size_pattern", sizes)


def butterfly_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Options that give isotune's BOFT these numbers of factors and block sizes: (m, blocks, b, …) by module."""
    sizes, factors = ({name: shape[i] for name, shape in shapes.items()} for i in (2, 0))
    return {
        **by_module("boft_block_size", "block_size_pattern", sizes),
        **by_module("boft_n_butterfly_factor", "butterfly_factor_pattern", factors),
    }
