"""UORA (Zhang et al., ACL 2025, arXiv 2505.20154): trained vectors around shared random matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from isotune.adapter.shared import SharedAdapter
from isotune.methods.checks import require, require_number, require_positive_integer, require_seed
from isotune.methods.config import IsotuneConfig


@dataclass
class UoraConfig(IsotuneConfig):
    """Configuration of UORA: W' = W + diag(b) B diag(d) A, of which only the vectors b (out,) and d (r,) are trained.

    A (r, in) and B (out, r) are random, orthonormal at the start, frozen, and shared by all layers of their shape. In
    training `isotune.moving.UoraSchedule` re-initialises the rows of A and columns of B whose entries of d are
    small; its threshold, weight and interval have no default, since the paper's are not public. Without a schedule this
    is VeRA on orthonormal matrices.

    The options have the names of PEFT's VeRA.

    Args:
        r: rank; it may be larger than the sides of a weight.
        d_initial: d at the start; b starts at zero.
        vera_dropout: dropout on the input of the update.
        projection_prng_key: seed of A and B.

    Raises:
        ValueError: a value is not allowed; the message says what to change.
    """

    title, usual_learning_rate = "UORA", 5e-2

    r: int = field(default=256)
    d_initial: float = field(default=0.1)
    vera_dropout: float = field(default=0.0)
    projection_prng_key: int = field(default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_integer("r", self.r)
        fits = 0.0 < self.d_initial < float("inf")
        require(fits, "d_initial", self.d_initial, "it must be above 0 and finite, since b starts at zero")
        require_number("vera_dropout", self.vera_dropout, below=1)
        require_seed("projection_prng_key", self.projection_prng_key)

    def build_operator(self, module: str, in_features: int, out_features: int) -> SharedAdapter:
        """A new adapter, whose update is zero."""
        adapter = SharedAdapter(self.r, in_features, out_features, self.projection_prng_key, self.d_initial)
        adapter.dropout = self.vera_dropout
        return adapter

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> SharedAdapter:
        # No tensor of the file says how many inputs a layer has; without them there is no A, and nothing to compute.
        return self.build_operator(module, 0, tensors["vera_lambda_b"].shape[0])
