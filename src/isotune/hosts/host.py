"""What every host is: a frozen layer seen as a matrix W of shape (out, in)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from isotune.distributed import is_sharded
from isotune.tensor_parallel import divide_like, mesh_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Fold = Callable[..., Tensor]
"""fold(matrix, rows, at) -> matrix with the active adapters in it, in its own dtype; the others as in Form.fold."""


class Kept(NamedTuple):
    """What `Host.restore` puts back."""

    weight: Tensor
    """What `Host.weight` was."""
    module: nn.Module | None = None
    """A copy of the layer that holds what else belongs to the weight, where there is more."""


class Host(ABC):
    """A frozen layer seen as a matrix W of shape (out, in)."""

    kinds: ClassVar[tuple[str, ...]]
    quantised: ClassVar[bool] = False
    """Whether W is packed: `matrix` makes it anew at each call, and `set_matrix` rounds it."""
    multiplies = False
    """Whether the module is x Wᵀ + b by its parameters weight and bias and nothing more, so that this may be computed
    in its place."""
    folds: ClassVar[bool] = False
    """Whether adapters act on W (or rows of it) at each call, since W does not multiply the input as it is."""

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.module = module
        self.name = name

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this class is the host of such a module."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The parameter that holds W, in the module's own layout."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """W as (out, in), in its own dtype, without a graph; a view of the parameter unless `quantised`."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the module's own weight."""

    @abstractmethod
    def set_matrix(self, matrix: Tensor) -> None:
        """Put `matrix` (out, in) in the place of W, as a new parameter: whoever shares the old one keeps it."""

    def check_merge(self) -> None:  # noqa: B027
        """Raise a ValueError if `set_matrix` is not possible."""

    @abstractmethod
    def keep(self) -> Kept:
        """What `restore` needs to undo a `set_matrix` to come."""

    @abstractmethod
    def restore(self, kept: Kept) -> None:
        """Put back what `keep` has returned, the same bits, on the device and in the dtype that the layer has now."""

    def call_folded(self, base_layer: nn.Module, fold: Fold, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with `fold` applied to W, for a host that `folds`.

        Args:
            base_layer: what stands in the model for the host: the module itself, or another tuner's layer around it.
            fold: as described there.
            x, args, kwargs: of the layer's forward.
        """
        raise NotImplementedError(f"{type(self).__name__} multiplies its input by W, so nothing has to be folded.")

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return int(self.matrix().shape[1])

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return int(self.matrix().shape[0])


class WeightHost(Host):
    """A layer whose parameter named weight holds W, with the same elements in the same order.

    Raises:
        ValueError: the weight is not floating-point, or has another number of dimensions than `dimensions`.
    """

    parameter = "weight"
    """Its name in the module."""

    @property
    def dimensions(self) -> int:
        """How many the weight has."""
        return 2

    def __init__(self, module: nn.Module, name: str = "") -> None:
        super().__init__(module, name)
        weight = self.weight
        if weight.ndim != self.dimensions or weight.dtype not in _DTYPES:
            raise ValueError(
                f"The weight of {name or type(module).__name__!r}, a {type(module).__module__}."
                f"{type(module).__qualname__}, has shape {tuple(weight.shape)} and dtype {weight.dtype}; "
                f"{self.dimensions} dimensions and floating-point numbers of 16 bits or more are needed. A layer "
                "packed or quantised by this library cannot be adapted: load the base model unquantised or quantised "
                "by another (see the guide on quantised bases), or exclude the layer with exclude_modules."
            )

    @property
    def weight(self) -> nn.Parameter:
        """The parameter named weight."""
        weight: nn.Parameter = getattr(self.module, self.parameter)
        return weight

    def weight_name(self, base_layer: nn.Module) -> str:
        """The name of the weight within what stands in the model for the host."""
        return next(
            f"{name}.{self.parameter}" if name else self.parameter
            for name, m in base_layer.named_modules()
            if m is self.module
        )

    def check_merge(self) -> None:
        """Refuse a weight of which FSDP has given this process a part."""
        if is_sharded(self.weight) and mesh_of(self.module) is None:
            raise ValueError(
                f"The weight of {self.name!r} is spread over several processes, and nothing can be merged into a part "
                "of it; nothing was merged. Save the adapter, and merge it into the base model loaded in one process."
            )

    def matrix(self) -> Tensor:
        """W, all dimensions but the first as one."""
        return self.weight.detach().flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """W in the shape of the weight."""
        return matrix.reshape(self.weight.shape)

    def set_matrix(self, matrix: Tensor) -> None:
        """Replace the weight parameter by a new one, divided as it was."""
        before = self.weight
        weight = self.stored(matrix).contiguous().to(before.device, before.dtype)
        weight = divide_like(weight, before) if is_sharded(before) else weight
        setattr(self.module, self.parameter, nn.Parameter(weight, requires_grad=before.requires_grad))

    def keep(self) -> Kept:
        """The parameter."""
        return Kept(self.weight)

    def restore(self, kept: Kept) -> None:
        """The very parameter object, so ties to other modules are ties again."""
        original, current = kept.weight, self.weight
        assert isinstance(original, nn.Parameter)
        if original.device != current.device or original.dtype != current.dtype:  # moved or cast meanwhile
            moved = original.data.to(current.device, current.dtype)
            if is_sharded(original):  # to its data alone a divided tensor would pay no heed
                original = nn.Parameter(moved, requires_grad=original.requires_grad)
            else:
                original.data = moved
        setattr(self.module, self.parameter, original)


def widen(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
