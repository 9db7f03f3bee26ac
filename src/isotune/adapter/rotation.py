"""The forms *input rotation*, y = host(x M), and *output rotation*, y = M · host(x), M a chain of factors."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import without_autocast, working_dtype
from isotune.adapter.kernels import rotated_linear
from isotune.adapter.operator import ALL, Below, FrozenLinear, Operator, Part
from isotune.algebra.cayley import CayleyMap
from isotune.algebra.factors import Chain, LowRank, apply_chain, transpose_chain
from isotune.parallel.tensor_parallel import Share


class RotationAdapter(Operator):
    """An operator on all inputs or outputs of a layer, as a chain of factors, since n × n is too large to form.

    Args:
        size: n, the width of the rotated side.
        chain: the factors whose tensors `complete` returns, in the order in which they act.
    """

    additive = False
    divisible = True
    """Whether multiplying the parameters by a scale gives that part of the rotation."""
    cayley: CayleyMap | None = None
    """How the rotations are made of the parameter `generator`, if the method has it."""

    def __init__(self, size: int, chain: Chain) -> None:
        super().__init__(size)
        self.chain = chain
        self.side = "input"
        self._scale = 1.0

    @property
    def gain(self) -> nn.Parameter | None:
        """Trainable factors of the layer's outputs, (out,), if the method has them."""
        return None

    def _acting(self, tensors: tuple[Tensor, ...], drop: bool = False) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The tensors of the chain (with `drop`, random blocks are the identity), and the gain or None."""
        count = len(tensors) - len(self.beside)
        return self.complete(tensors[:count], drop), tensors[count] if self.beside else None

    def chain_tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The tensors of the chain, without dropout."""
        return self._acting(self.tensors(dtype))[0]

    def matrix(self) -> Tensor:
        """M itself, (n, n)."""
        tensors = self.chain_tensors()
        eye = torch.eye(self.size, dtype=tensors[0].dtype, device=tensors[0].device)
        return apply_chain(eye, self.chain, tensors)

    def is_identity(self) -> bool:
        """Whether M is the identity and every gain one."""
        return super().is_identity() and (self.gain is None or bool((self.gain == 1).all()))

    def output(self, x: Tensor, tensors: tuple[Tensor, ...], below: Below) -> Tensor:
        """gain ⊙ host(x M), or gain ⊙ M · host(x); neither the gain nor a rotation of outputs acts on the bias."""
        tensors, gain = self._acting(tensors, self.training)
        if self.side == "output":
            result = below.call(x)
        else:
            x = x.to(working_dtype(x))
            result = below.call(_on_all(below.division.of_input(x), x, self.chain, tensors))
            if gain is None:
                return result
        if not isinstance(result, Tensor):
            raise below.no_tensor(result)
        share, bias = below.division.of_output(result), below.division.bias_of(result, below.bias)
        # Computed as an addition to the output, so that an adapter that changes nothing changes no bit.
        own = result if bias is None else result - bias.to(result.dtype)
        if self.side == "output":
            chain, tensors = transpose_chain(self.chain, [tensor.to(result.dtype) for tensor in tensors])
            with without_autocast(result):  # which would cast float32 outputs, such as bitsandbytes'
                turned = _on_all(share, own, chain, tensors)
            result = turned if bias is None else result + (turned - own)
            own = turned
        if gain is None:
            return result
        return result + own * (share.of(gain) - 1).to(result.dtype)

    def fused(self, x: Tensor, tensors: tuple[Tensor, ...], linear: FrozenLinear) -> Tensor | None:
        """The chain, the product with W and the gain in one node; None for a rotation of outputs."""
        if self.side == "output":
            return None
        x = x.to(working_dtype(x))
        tensors, gain = self._acting(tensors, self.training)
        return rotated_linear(x, gain, self.chain, tensors, *linear)

    def fold(self, matrix: Tensor, tensors: tuple[Tensor, ...], part: Part = ALL, *, drop: bool = False) -> Tensor:
        """diag(gain) W Mᵀ, or diag(gain) M W."""
        if matrix.ndim == 3:
            each = [self._turned(own, [tensor[index] for tensor in tensors]) for index, own in enumerate(matrix)]
            return torch.stack(each)
        tensors, gain = self._acting(tensors, drop)
        rotated = self._turned(matrix, tensors)
        if gain is None:
            return rotated
        own = gain.to(matrix.dtype)
        return rotated * (own if part.at is None else own.index_select(0, part.at))[:, None]

    def _turned(self, matrix: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """W Mᵀ, or M W."""
        chain, tensors = transpose_chain(self.chain, tensors)
        if self.side == "input":
            return apply_chain(matrix, chain, tensors)
        return apply_chain(matrix.mT, chain, tensors).mT

    def low_rank(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The factors for reflections, M = I + L R: W Rᵀ and Lᵀ, or L and R W."""
        if not self.has_low_rank:
            raise ValueError(
                f"This method rotates all {self.side}s of a layer, so its update has full rank and cannot be a LoRA "
                "adapter; export the merged model instead (--to merged)."
            )
        left, right = self.chain_tensors()
        if self.side == "output":
            return left, right @ matrix.to(right.dtype)
        return matrix.to(right.dtype) @ right.mT, left.mT

    @property
    def has_low_rank(self) -> bool:
        """Whether M − I is a product of two thin matrices; all other rotations change every direction."""
        return [type(factor) for factor in self.chain] == [LowRank] and not self.beside

    @property
    def form_key(self) -> Hashable:
        """The side."""
        return self.side

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """As in `Adapter.tensors`; at a scale other than 1 the adapter is evaluated on its own."""
        return super().tensors(dtype) if self._scale == 1.0 else self(dtype)

    def in_part(self, name: str, parameter: Tensor) -> Tensor:
        """A generator, an angle, a scale or a gain, with its difference from the identity multiplied by the scale."""
        if self._scale == 1.0 or not self.divisible:  # the directions of reflections have no parts
            return parameter
        parameter = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        if name == "generator" and self.cayley is not None:
            parameter = self.cayley.generator(parameter) / self.cayley.scale
        return 1 + self._scale * (parameter - 1) if name in self.near_one else self._scale * parameter

    def check_scale(self, scale: float) -> None:
        """Refuse a scale that this rotation does not support.

        Raises:
            ValueError: the scale is not finite, or the scale of reflections is neither 0 nor 1.
        """
        if not (math.isfinite(scale) and (self.divisible or scale in (0.0, 1.0))):
            allowed = "any finite number" if self.divisible else "only 0 or 1, as reflections have no parts"
            raise ValueError(f"The scale of this adapter can be {allowed}, but {scale} was given.")

    def set_scale(self, scale: float) -> None:
        """Multiply generators, angles and the differences of gains from 1 by `scale`, which keeps M a rotation."""
        self.check_scale(scale)
        self._scale = scale

    @property
    def relative_scale(self) -> float:
        """The current scale."""
        return self._scale

    def kept(self, in_features: int) -> int:
        """The rotated side, and for a gain of rotated outputs these outputs too."""
        return self.size * (2 if self.side == "output" and self.beside else 1)

    def describe(self) -> str:
        """The width and the rotated side."""
        return f"rotation of {self.size} {self.side}s"


def _on_all(share: Share, x: Tensor, chain: Chain, tensors: Sequence[Tensor]) -> Tensor:
    """Apply the chain to the whole tensor of which x may be a share: a rotation mixes the shares of all processes."""
    return share.of(apply_chain(share.joined(x), chain, tensors))
