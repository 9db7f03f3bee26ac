"""One layer that a single file adapts, and what its configuration in isotune takes from all of them."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isotune.errors import AdapterFileError
from isotune.hosts import widen
from isotune.methods import OFTConfig

Parameters = dict[str, dict[str, Tensor]]
"""Module name -> those of its operator."""


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted layer: what the file holds of it and the module it is on."""

    name: str
    prefix: str
    """Of its name in the file."""
    weight: Tensor
    """In the module's own layout."""
    tensors: Mapping[str, Tensor]
    where: str

    @property
    def width(self) -> int:
        """in_features of W, a convolution's kernel counted in."""
        return math.prod(self.weight.shape[1:])

    @property
    def outputs(self) -> int:
        """out_features of W."""
        return len(self.weight)

    @property
    def sign(self) -> int:
        """Of the generator beside that of a linear layer: these tools rotate inputs there, x R, thus W Rᵀ; but a
        convolution's flattened kernels themselves, W R."""
        return 1 if self.weight.ndim == 2 else -1

    def refuse(self, reason: str) -> AdapterFileError:
        return AdapterFileError(f"{self.where}: {self.name!r}: {reason}")

    def side(self, side: str) -> int:
        """How many inputs or outputs."""
        return self.outputs if side == "output" else self.width

    def tensor(self, key: str, dimensions: int) -> Tensor:
        """One of its tensors, float32 at least; refuses one that is not there or of other dimensions."""
        tensor = self.tensors.get(key)
        if tensor is None or tensor.ndim != dimensions:
            found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
            raise self.refuse(f"a tensor {key} of {dimensions} dimensions belongs to it, and the file holds {found}.")
        return widen(tensor)


def block_options(layers: list[AdaptedModule], sizes: Mapping[str, int], side: str) -> dict[str, Any]:
    """Options by which isotune's OFT has these sizes: one size, one number of blocks, or the nearest that divides."""
    counts = {layer.side(side) // sizes[layer.name] for layer in layers}
    if len(set(sizes.values())) == 1:
        return {"oft_block_size": sizes[layers[0].name]}
    if len(counts) == 1:
        return {"r": counts.pop()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size, _ in Counter(sizes.values()).most_common():
            trial = OFTConfig(oft_block_size=size, adjust="nearest")
            if all(trial.block_size_for(x.name, x.side(side)) == sizes[x.name] for x in layers):
                return {"oft_block_size": size, "adjust": "nearest"}
    shown = ", ".join(f"{layer.name}: {sizes[layer.name]}" for layer in layers[:8])
    raise layers[0].refuse(f"the layers have blocks of unrelated sizes ({shown}, …), and isotune's OFT has one option.")


def targets_of(layers: list[AdaptedModule]) -> dict[str, Any]:
    """These layers and no others, whose names may end alike."""
    return {"target_modules": "|".join(re.escape(name) for name in sorted(layer.name for layer in layers))}
