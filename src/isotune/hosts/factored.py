"""A linear layer of low rank that stands where a dense one was, and the host of adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.hosts.computed_weight import ComputedWeight
from isotune.hosts.host import Host, widen
from isotune.parallel.sharding import gathered, is_sharded

_UNSEEN = 1e-3
"""Share of a change of W that may lie outside of the rows of the layer: that of rounding."""
_FACTORS = ("left", "values", "right")
ALIKE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative difference up to which factors count as the same: an adapter's and the layer's own, or of a weight moved or
cast since."""


class FactoredWeight(ComputedWeight):
    """W_k of a `FactoredLinear`, as a layer's weight."""

    instead = "The layer keeps it as two factors: give it the new weight by load_state_dict, or adapt the whole base."


class FactoredLinear(nn.Module):
    """A frozen linear layer whose weight is W_k = left diag(values) right: y = ((x rightᵀ) ⊙ values) leftᵀ + b.

    Inside an adapted layer its state dict holds the factors. Anywhere else it holds the dense W_k as `weight`, in the
    layout of the layer that was replaced, so that whatever saves the model writes one that loads without isotune.

    Args:
        left: U_k, (out, k).
        values: σ, (k,).
        right: V_kᵀ, (k, in), orthonormal rows.
        bias: the replaced layer's own bias, (out,), or None.
        filling: how many zeros to append to the k directions, which makes room for an adapter's factors of a rank at
            which matrix products are fast.
        transposed: whether the replaced layer stored Wᵀ, as GPT-2's Conv1D does.
        energy: the share of ‖W‖_F² of the replaced weight that W_k holds.
    """

    def __init__(
        self,
        left: Tensor,
        values: Tensor,
        right: Tensor,
        bias: nn.Parameter | None,
        *,
        filling: int = 0,
        transposed: bool = False,
        energy: float = 1.0,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.rank = len(left), right.shape[1], len(values)
        pad = nn.functional.pad
        self.left = nn.Parameter(pad(left, (0, filling)).contiguous(), requires_grad=False)
        self.values = nn.Parameter(pad(values, (0, filling)), requires_grad=False)
        self.right = nn.Parameter(pad(right, (0, 0, 0, filling)).contiguous(), requires_grad=False)
        self.bias = bias
        self.transposed, self.energy = transposed, energy
        self.register_state_dict_post_hook(_write_dense)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_read_dense)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """y, by two products."""
        return nn.functional.linear(nn.functional.linear(x, self.right) * self.values, self.left, self.bias)

    def matrix(self) -> Tensor:
        """W_k (out, in), computed at each call and rounded once to the dtype of the factors."""
        left, values, right = (gathered(factor).detach() for factor in (self.left, self.values, self.right))
        device = left.device if left.device.type != "mps" else torch.device("cpu")
        # float64 is changed neither by autocast nor by TF32.
        wide, others = left.to(device).double() * values.to(device).double(), right.to(device).double()
        return (wide @ others).to(left.dtype).to(left.device)

    @property
    def weight(self) -> Tensor:
        """W_k in the layout of the layer that was replaced, computed at each use; writing to it is an error."""
        matrix = self.matrix()
        return (matrix.mT if self.transposed else matrix).as_subclass(FactoredWeight)

    def left_of(self, matrix: Tensor) -> Tensor:
        """The `left` with which the layer computes another matrix.

        Args:
            matrix: (out, in), whose rows are combinations of those of W_k.

        Raises:
            ValueError: they are not.
        """
        left, values, right = (widen(factor.detach()) for factor in (self.left, self.values, self.right))
        before, rows = self.matrix().to(left), right[: self.rank]
        change = matrix.to(left) - before
        added = torch.linalg.solve(rows @ rows.mT, rows @ change.mT).mT
        norm = torch.linalg.vector_norm
        rounding = torch.finfo(self.left.dtype).eps * norm(before)
        if not norm(change - added @ rows) <= _UNSEEN * norm(change) + rounding:
            raise ValueError(
                f"The new weight has directions that this layer of rank {self.rank} ({self.out_features} × "
                f"{self.in_features}) does not have, so it cannot hold it. Load it into the layer that was replaced."
            )
        scaled = torch.where(values[: self.rank] != 0, added / values[: self.rank], 0.0)
        found: Tensor = (left + nn.functional.pad(scaled, (0, len(values) - self.rank))).to(self.left.dtype)
        return found

    def extra_repr(self) -> str:
        """The sizes, as nn.Linear has them, and the rank."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"


def _write_dense(module: FactoredLinear, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """In a state dict, replace the factors by W_k unless they are those of an adapted layer."""
    if not prefix.endswith("base_layer."):
        for name in _FACTORS:
            del state_dict[prefix + name]
        state_dict[prefix + "weight"] = module.weight.contiguous()


def _read_dense(
    module: FactoredLinear, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """In a state dict that is about to be loaded, replace a dense weight by the factors that hold it."""
    dense = state_dict.get(prefix + "weight")
    if dense is None or dense.shape != module.weight.shape:
        return
    del state_dict[prefix + "weight"]
    state_dict.update({prefix + name: getattr(module, name).detach() for name in _FACTORS})
    try:
        matrix = (dense.mT if module.transposed else dense).to(module.left.device)
        state_dict[prefix + "left"] = module.left_of(matrix)
    except ValueError as error:
        lists[-1].append(f"{prefix}weight: {error}")


class FactoredHost(Host):
    """A FactoredLinear: W is W_k, of which a merge changes `left` alone, exactly for an update in its row space."""

    kinds = ()  # nobody needs to be told to build one
    module: FactoredLinear
    modules = (FactoredLinear,)
    parameter = "left"
    stands_in = True

    def __init__(self, module: nn.Module, name: str = "") -> None:
        super().__init__(module, name)
        self.transposed = self.module.transposed

    @property
    def as_read(self) -> Tensor:
        """W_k in the layout of the layer that was replaced."""
        return self.module.weight

    def shape(self) -> tuple[int, int]:
        """The shape of W_k."""
        return self.module.out_features, self.module.in_features

    def matrix(self) -> Tensor:
        """W_k, computed at each call."""
        return self.module.matrix()

    def set_matrix(self, matrix: Tensor) -> None:
        """Replace `left`, as a new parameter, so that the layer computes `matrix`."""
        self.module.left = nn.Parameter(self.module.left_of(matrix), requires_grad=False)

    def leading(self, count: int) -> Tensor:
        """The first right singular vectors, (count or k, in), at least float32."""
        return widen(gathered(self.module.right).detach()[: min(count, self.module.rank)])

    def shared(self, down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The layer's own factors, where they are those of the adapter: views, so that none are held twice."""
        left, right = self.module.left.detach(), self.module.right.detach()
        count, norm = len(down), torch.linalg.vector_norm
        if is_sharded(right) or count > len(right) or down.dtype != right.dtype or down.device != right.device:
            return down, up
        for own, given in ((right[:rank], down[:rank]), (left[:, :rank], up[:, :rank])):
            if norm(widen(own) - widen(given)) > ALIKE[own.dtype] * norm(widen(given)):
                return down, up
        return right[:count], left[:, :count]
