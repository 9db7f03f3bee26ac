"""The form *subspace update*: y = host(x) + s·((x downᵀ)(M − I)) upᵀ, M on the coordinates of a subspace."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import wide
from isotune.adapter.kernels import subspace_update, update_of_one_token
from isotune.adapter.operator import ALL, Base, Operator, Part, Stored
from isotune.adapter.placement import Factors, Placement, filling, update_factors
from isotune.adapter.update import PlacedUpdate
from isotune.parallel.tensor_parallel import UNSPLIT, Shares


class SubspaceBasis(Stored):
    """What a file stores of the subspace of one adapter on one layer: the pin S = V Ω, (r, p), or V itself.

    An adapter whose subspace has moved stores V, and beside it the update U D that it has accumulated on earlier
    subspaces. A stored V or pin of zeros means that no subspace has
    been found yet.

    Args:
        rank: r.
        in_features: number of columns of W.
        pin_width: p; None stores V itself.
        device: device of the buffers.
    """

    pin: Tensor | None
    basis: Tensor | None
    up: Tensor | None
    """U, (out, k)."""
    down: Tensor | None
    """D, (k, in)."""
    moves: Tensor | None
    """The number of the boundary at which the subspace last moved, a scalar."""

    def __init__(self, rank: int, in_features: int, pin_width: int | None, device: torch.device) -> None:
        super().__init__()
        self.in_features = in_features
        stored = torch.zeros(rank, pin_width or in_features, device=device, dtype=torch.float32)
        self.register_buffer("pin", None if pin_width is None else stored)
        self.register_buffer("basis", stored if pin_width is None else None)
        for name in ("up", "down", "moves"):
            self.register_buffer(name, None)

    @property
    def embedded(self) -> bool:
        """Whether V itself is stored."""
        return self.basis is not None

    @property
    def stored(self) -> Tensor:
        """The pin, (r, p), or the basis, (r, in)."""
        own = self._buffers  # and not as attributes, for which nn.Module looks in three places: every pass asks
        stored = own["pin"] if own["basis"] is None else own["basis"]
        assert stored is not None
        return stored

    @property
    def accumulated(self) -> tuple[Tensor, Tensor] | None:
        """U and D; None if the subspace has never moved."""
        up, down = self._buffers["up"], self._buffers["down"]
        return None if up is None or down is None else (up, down)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors on which the placement depends."""
        return (self.stored, *(self.accumulated or ()))

    def is_empty(self) -> bool:
        """Whether nothing is stored yet, neither solved here nor loaded from a file."""
        return self.stored.is_meta or not bool(self.stored.any())

    @torch.no_grad()
    def record(self, value: Tensor) -> None:
        """Store a pin or a basis."""
        if self.stored.is_meta:
            setattr(self, "basis" if self.embedded else "pin", torch.empty_like(self.stored, device=value.device))
        self.stored.copy_(value)

    def allocate(self, rank: int, out_features: int) -> None:
        """Make room for an accumulated update of a rank."""
        room = self.stored.new_zeros
        self.hold({"up": room(out_features, rank), "down": room(rank, self.in_features), "moves": room(())})

    def fit(self, given: Mapping[str, Tensor]) -> None:
        """Make room for tensors that are about to be loaded, if this basis or theirs has moved.

        A checkpoint has other sizes than the adapter in training if one of them has moved further. A basis that was
        made from a file's configuration is still empty, and keeps the sizes that the configuration says.
        """
        shapes = {name: tensor.shape for name, tensor in given.items()}
        own = {name: tensor.shape for name, tensor in self.held().items() if tensor is not None}
        moved = {"basis", "up", "down", "moves"}
        alike = shapes.keys() == moved or (self.up is not None and shapes.keys() in ({"pin"}, {"basis"}))
        if shapes == own or not alike or len(next(iter(given.values()))) != len(self.stored) or self.is_empty():
            return
        self.hold({name: self.stored.new_zeros(shapes[name]) if name in shapes else None for name in self.held()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.fit({name: state_dict[prefix + name] for name in self.held() if prefix + name in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *args)


class SubspaceAdapter(PlacedUpdate, Operator):
    """An operator on the r coordinates of the principal subspace, in the form of an update; M − I is (r, r).

    Args:
        size: r.
    """

    principal = True
    coordinates: Mapping[str, Literal["skew", "transposed"]] = {}
    """Parameters that are not, by their shape, a vector of the r coordinates or a matrix laid out as M − I: "skew" for
    the strict upper triangle of a skew-symmetric matrix, "transposed" for the transpose of M − I."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.power: float | None = 0.0
        """How the singular values are split between the two factors: the power p of `Placement`."""

    @abstractmethod
    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Map parameters, all with the same leading dimensions, to M − I of shape (..., r, r)."""

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor]:
        """M − I, padded with zeros to the size of the factors, (..., r or more, r or more)."""
        difference, zeros = self.difference_of(parameters), filling(self.size)
        return (nn.functional.pad(difference, (0, zeros, 0, zeros)) if zeros else difference,)

    def difference(self, dtype: torch.dtype | None = None) -> Tensor:
        """M − I, (r, r)."""
        return self._own(self.tensors(dtype)[0])

    def _own(self, difference: Tensor) -> Tensor:
        """M − I without its zero padding."""
        return difference[..., : self.size, : self.size]

    def matrix(self) -> Tensor:
        """M itself, (r, r)."""
        difference = self.difference()
        return difference + torch.eye(self.size, dtype=difference.dtype, device=difference.device)

    def is_identity(self) -> bool:
        """Whether M is the identity and nothing is accumulated on earlier subspaces."""
        return not self.accumulated_rank and super().is_identity()

    def factors_on(self, basis: Tensor, matrix: Tensor, accumulated: Factors | None) -> Factors:
        """down and up in the dtype of W, padded with zeros to a rank at which products are fast."""
        down, up = update_factors(basis, matrix, self.power, accumulated)
        zeros, pad = filling(down.shape[-2]), nn.functional.pad
        return pad(down.to(matrix), (0, 0, 0, zeros)).contiguous(), pad(up.to(matrix), (0, zeros)).contiguous()

    def _acting(self, difference: Tensor, dtype: torch.dtype, *, filled: bool) -> Tensor:
        """What acts between down and up: s (M − I), and beside it the identity for what is accumulated.

        Args:
            difference: M − I with its zero padding.
            filled: whether to pad the result with zeros to the size of the factors.
        """
        placement, size = self.placement, self.size
        if placement is None or not placement.accumulated:
            return self._scaled(difference if filled else self._own(difference), dtype)
        rank = size + placement.accumulated
        more = (len(placement.down) if filled else rank) - size
        acting = nn.functional.pad(self._scaled(self._own(difference), dtype), (0, more, 0, more))
        acting.diagonal()[size:rank].fill_(self.relative_scale)
        return acting

    @property
    def placement_key(self) -> Hashable:
        """The rank, and how the singular values are split."""
        return self.size, self.power

    def added(self, x: Tensor, tensors: tuple[Tensor, ...], base: Base, shares: Shares = UNSPLIT) -> Tensor:
        """base + s·((x downᵀ)(M − I)) upᵀ."""
        down, up = factors = self.factors(x.dtype, x.device)
        found = update_of_one_token(x, base, factors, lambda: self._absorbed(tensors[0], factors))
        if found is not None:
            return found
        update = self._acting(tensors[0], x.dtype, filled=True)
        of_x, of_result = shares
        factors = of_x.cut(down), of_result.cut(up, 0)
        return subspace_update(x, update, base, factors, shares)

    def _absorbed(self, difference: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """down and up, the smaller one times s·(M − I); kept until a call ends, if `difference` lasts that long."""
        given, sources = self.given, (difference, self.placement, self.scale)
        if given.made is not None and all(map(operator.is_, given.made[0], sources)):
            kept: tuple[Tensor, Tensor] = given.made[1]
            return kept
        down, up = factors
        update = self._acting(difference, down.dtype, filled=True)
        found = (update.mT @ down, up) if down.shape[1] <= up.shape[0] else (down, up @ update.mT)
        # While a CUDA graph is captured, nothing has a value until the graph is replayed.
        captured = difference.is_cuda and torch.cuda.is_current_stream_capturing()
        if given.tensors is not None and given.tensors[0] is difference and not captured:
            given.made = sources, found
        return found

    def fold(self, matrix: Tensor, tensors: tuple[Tensor, ...], part: Part = ALL, *, drop: bool = False) -> Tensor:
        """W + s·up (M − I)ᵀ down, and with it what is accumulated."""
        (down, up), rank = self.factors(matrix.dtype, matrix.device), self.size + self.accumulated_rank
        down, up, update = down[..., :rank, :], up[..., :rank], self._acting(tensors[0], matrix.dtype, filled=False)
        rows, at, multiple = part
        if matrix.ndim == 3 and at is not None:
            down, up = down.index_select(0, at), up.index_select(0, at)
        if rows is None:
            return matrix + (up @ update.mT) @ down
        # Any factor by which the look-up multiplies rows of W must also multiply their update. Where up does not follow
        # from the rows alone, it is read, and multiplied by that factor; otherwise up is recomputed from the rows, as
        # W downᵀ, divided if the singular values are split.
        if (self.accumulated_rank or self.power is None) and at is not None:
            up = up.index_select(0, at)
            up = up if multiple is None else up * multiple
        else:
            up = rows @ (down / down.square().sum(1, keepdim=True)).mT
        return torch.addmm(matrix, up @ update.mT, down)

    def low_rank(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """s·up (M − I)ᵀ and down; if the subspace has moved, followed by what is accumulated."""
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        (down, up), rank = self.factors(dtype, matrix.device), self.size + self.accumulated_rank
        return up[:, :rank] @ self._acting(self.tensors()[0], dtype, filled=False).mT, down[:rank]

    @property
    def form_key(self) -> Hashable:
        """The configured scale, and how the singular values are split."""
        return self.configured_scale, self.power

    def identity(self) -> dict[str, Tensor]:
        """The parameters of the identity, if there is one: ones for those that start at 1, zeros for others."""
        return {name: torch.full_like(p.detach(), float(name in self.near_one)) for name, p in self.named_parameters()}

    @property
    def fixed(self) -> str | None:
        """That M is not the identity where its parameters are zero, so that it cannot start anew."""
        values = self.identity()
        if not bool(self.difference_of(wide(tuple(values), tuple(values.values()))).any()):
            return None
        name = type(self).__name__
        return f"{name} is not the identity where its parameters are zero. Use PSOFT, LoRA-XS or another that is."

    def start(self, placement: Placement, generator: torch.Generator) -> dict[str, Tensor]:
        """The identity."""
        return self.identity()

    def spanning(self) -> Tensor:
        """down, without what is accumulated."""
        down, _ = self.factors(torch.float32, next(self.parameters()).device)
        return down[: self.size]
