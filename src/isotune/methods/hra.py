"""HRA (Yuan et al., NeurIPS 2024, arXiv 2405.17484): a product of Householder reflections of the inputs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isotune.adapter.rotation import RotationAdapter
from isotune.algebra.factors import LowRank
from isotune.algebra.householder import orthonormal_reflection, reflection_penalty, reflections
from isotune.algebra.means import reflection_mean
from isotune.methods.checks import require_number, require_positive_integer
from isotune.methods.rotation import RotationConfig


@dataclass
class HRAConfig(RotationConfig):
    """Configuration of HRA: y = host(x M), W' = W H₁ H₂ ⋯ H_r with H = I − 2 u uᵀ.

    Args:
        r: number of reflections; even, since they start in equal pairs, which cancel.
        apply_GS: the strict form, λ = ∞: orthonormal directions by Gram-Schmidt, W' = W (I − 2 U Uᵀ). No U makes this
            the identity, so it needs init_weights=False, and training does not start from the base model.
        regularizer_weight: λ of the loss λ ‖I − UᵀU‖²_F, which `isotune.regularization_loss` returns; 0 for none.

    Raises:
        ValueError: a value is not allowed or a combination has no effect; the message says what to change.
    """

    peft_bias = "hra_only"
    title, size_names, size_step = "HRA", {"r": "r"}, 2

    r: int = field(default=8)
    apply_GS: bool = field(default=False)
    regularizer_weight: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_integer("r", self.r)
        require_number("regularizer_weight", self.regularizer_weight)
        if self.apply_GS and self.init_weights:
            raise ValueError(
                "apply_GS=True cannot start at the identity: with orthonormal directions I − 2 U Uᵀ reverses each of "
                "them. Set init_weights=False to start from random directions anyway, or set apply_GS=False with a "
                "regularizer_weight, such as 1e-4, to keep the directions nearly orthogonal."
            )
        if self.apply_GS and self.regularizer_weight:
            raise ValueError(
                "regularizer_weight has no effect with apply_GS=True; set regularizer_weight=0 or apply_GS=False."
            )
        if self.r % 2 and not self.apply_GS:
            near = f"{self.r - 1} or {self.r + 1}" if self.r > 1 else "2"
            raise ValueError(
                f"r={self.r} is not allowed: an odd number of reflections has determinant −1, so it cannot start at "
                f"the identity. Choose r={near}."
            )

    def rotation(self, module: str, width: int, out_features: int) -> HRAOperator:
        if self.apply_GS and self.r > width:
            raise ValueError(
                f"r={self.r} is too large for {module!r} with apply_GS=True: {width} {self.side}s have at most {width} "
                f"orthonormal directions. Choose a smaller r, or exclude the module with exclude_modules."
            )
        return HRAOperator(width, self.r, strict=self.apply_GS, regularizer_weight=self.regularizer_weight)

    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The length of a direction; out_features does not matter."""
        return tensors["vectors"].shape[1], 1


class HRAOperator(RotationAdapter):
    """M = H_r ⋯ H₂ H₁ with the directions `vectors`, (r, n), of any nonzero length.

    Args:
        size: n.
        reflections: r.
        strict: orthonormal directions, M = I − 2 U Uᵀ.
        regularizer_weight: λ.
    """

    evaluated = ("vectors",)
    divisible = False

    def __init__(self, size: int, reflections: int, *, strict: bool = False, regularizer_weight: float = 0.0) -> None:
        super().__init__(size, (LowRank(),))
        self.strict = strict
        self.averages = {} if strict else {"vectors": reflection_mean}
        self.regularizer_weight = regularizer_weight
        directions = torch.randn(reflections if strict else reflections // 2, size, dtype=torch.float32)
        directions = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        self.vectors = nn.Parameter(directions if strict else directions.repeat_interleave(2, dim=0))

    def batch_key(self) -> Hashable:
        return self.strict

    def is_identity(self) -> bool:
        """Whether the directions are equal in pairs, so that the reflections cancel."""
        return not self.strict and bool(torch.equal(self.vectors[0::2], self.vectors[1::2]))

    def penalty(self) -> Tensor | None:
        """λ ‖I − UᵀU‖²_F."""
        if not self.regularizer_weight:
            return None
        return self.regularizer_weight * reflection_penalty(self.full_parameter("vectors"))

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """M − I as (..., n, r) and (..., r, n)."""
        vectors = parameters["vectors"]
        return orthonormal_reflection(vectors) if self.strict else reflections(vectors)

    def complete(self, tensors: tuple[Tensor, ...], drop: bool = False) -> tuple[Tensor, ...]:
        """M − I times the scale, which is 0 or 1."""
        left, right = tensors
        return tensors if self.relative_scale == 1.0 else (left * self.relative_scale, right)
