"""The form *low-rank update*: y = host(x) + s·(x Downᵀ) Upᵀ, both factors made from trained parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from isotune.adapter.kernels import complement, low_rank_update, update_of_one_token
from isotune.adapter.operator import ALL, Base, Part
from isotune.adapter.placement import Factors, update_factors
from isotune.adapter.update import PlacedUpdate, Update
from isotune.algebra.recording import is_plain
from isotune.parallel.tensor_parallel import UNSPLIT, Shares


class LowRankAdapter(Update):
    """An update whose factors Down (r, in) and Up (out, r) are differentiable functions of the parameters.

    The factors are made once for each layer and pass, without the tokens. For backward a layer keeps x, as LoRA does,
    and x Downᵀ.

    Args:
        size: r.
    """

    needs_rows = True

    @abstractmethod
    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Map parameters, all with the same leading dimensions, to Down (..., r, in) and Up (..., out, r)."""

    def forward(self, dtype: torch.dtype | None = None, at: Tensor | None = None) -> tuple[Tensor, ...]:
        """As in `Adapter.forward`; of many adapters all are evaluated, since each has a placement of its own."""
        tensors = super().forward(dtype)
        return tensors if at is None else tuple(tensor.index_select(0, at) for tensor in tensors)

    def _acting(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """s·Down and Up."""
        return self._scaled(tensors[0], dtype), tensors[1].to(dtype)

    def added(self, x: Tensor, tensors: tuple[Tensor, ...], base: Base, shares: Shares = UNSPLIT) -> Tensor:
        """base + s·(x Downᵀ) Upᵀ."""
        down, up = factors = self._acting(tensors, x.dtype)
        found = update_of_one_token(x, base, factors, lambda: factors)
        if found is not None:
            return found
        of_x, of_result = shares
        return low_rank_update(x, of_x.of(down), of_result.of(up, 0), base, shares)

    def fold(self, matrix: Tensor, tensors: tuple[Tensor, ...], part: Part = ALL, *, drop: bool = False) -> Tensor:
        """W + s·Up Down."""
        down, up = self._acting(tensors, matrix.dtype)
        if part.at is not None and matrix.ndim == 2:
            up = up.index_select(0, part.at)
        if part.multiple is not None:
            up = up * part.multiple
        return matrix + up @ down

    def low_rank(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Up and s·Down."""
        down, up = self._acting(self.tensors(), torch.promote_types(matrix.dtype, torch.float32))
        return up, down

    def kept(self, in_features: int) -> int:
        """The input, as for LoRA, and x Downᵀ."""
        return in_features + self.size


class PlacedLowRank(LowRankAdapter, PlacedUpdate):
    """Factors that also depend on the placement, which stays at least float32 whatever the model is cast to."""

    batched = False
    narrow = False  # differences of what is trained from them are small


class ComplementAdapter(PlacedLowRank):
    """Down = A (I − Vᵀ V) and Up = (I − U Uᵀ) B: an update that leaves the k strongest singular triplets of W alone.

    The placement's `down` is V, (k, in), and its `up` is U, (out, k): singular vectors of W, both at least float32. The
    parameters are A, `lora_A` (r, in), and B, `lora_B` (out, r), which is zero at the start.

    Args:
        size: r.
        in_features, out_features: of W.
        preserved: k.

    Source: Xiong and Xie, OPLoRA (AAAI 2026, arXiv 2510.13003), abstract.
    """

    evaluated = ("lora_A", "lora_B")

    def __init__(self, size: int, in_features: int, out_features: int, preserved: int) -> None:
        super().__init__(size)
        self.preserved = preserved
        self.lora_A = nn.Parameter(torch.empty(size, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, size, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT's LoRA starts

    def is_identity(self) -> bool:
        """Whether B is zero."""
        return not bool(self.lora_B.detach().any())

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Down and Up."""
        a, b = parameters["lora_A"], parameters["lora_B"]
        right, left = self.factors(a.dtype, a.device)
        if a.ndim > right.ndim:
            right, left = right[None], left[None]
        down, up = complement(a, right), complement(b.mT, left.mT).mT
        # As the kernels for decoding read it; but a trace, which is checked with gradients off, must not differ then.
        return down, up if torch.is_grad_enabled() or is_plain() else up.contiguous()

    def batch_key(self) -> Hashable:
        """r and k."""
        return self.size, self.preserved

    def factors_on(self, basis: Tensor, matrix: Tensor, accumulated: Factors | None) -> Factors:
        """V as given, and U = W Vᵀ Σ⁻¹, orthonormal to rounding; zero where σᵢ is rounding noise."""
        return update_factors(basis, matrix, None)

    @property
    def placement_key(self) -> Hashable:
        """k, apart from other forms."""
        return ComplementAdapter, self.preserved

    @property
    def basis_rank(self) -> int:
        """k."""
        return self.preserved

    def describe(self) -> str:
        """The rank, and how many singular triplets are preserved."""
        return f"rank {self.size}, {self.preserved} triplets preserved"
