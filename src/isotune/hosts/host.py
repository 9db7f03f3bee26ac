"""What every host is: a frozen layer seen as a matrix W of shape (out, in)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Fold = Callable[..., Tensor]
"""fold(matrix, rows, at) -> matrix with the active adapters in it, in its own dtype; the others as in Form.fold."""


class Host(ABC):
    """A frozen layer seen as a matrix W of shape (out, in)."""

    kinds: ClassVar[tuple[str, ...]]
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
    def weight(self) -> nn.Parameter:
        """The parameter that holds W, in the module's own layout."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """W as (out, in), a view of the parameter, in its own dtype, without a graph."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the module's own weight."""

    @abstractmethod
    def set_matrix(self, matrix: Tensor) -> None:
        """Put `matrix` (out, in) in the place of W, as a new parameter: whoever shares the old one keeps it."""

    @abstractmethod
    def restore(self, weight: nn.Parameter) -> None:
        """Put back a parameter taken from `weight` before."""

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

    @property
    def dimensions(self) -> int:
        """How many the weight has."""
        return 2

    def __init__(self, module: nn.Module, name: str = "") -> None:
        super().__init__(module, name)
        weight = self.weight
        if weight.ndim != self.dimensions or not weight.is_floating_point():
            raise ValueError(
                f"The weight of {name or type(module).__name__!r} has shape {tuple(weight.shape)} and dtype "
                f"{weight.dtype}; {self.dimensions} dimensions and floating-point numbers are needed. A quantised or "
                "packed layer cannot be adapted by this class: load the base model unquantised, or exclude the layer "
                "with exclude_modules."
            )

    @property
    def weight(self) -> nn.Parameter:
        """The parameter named weight."""
        weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return weight

    def weight_name(self, base_layer: nn.Module) -> str:
        """The name of the weight within what stands in the model for the host."""
        return next(
            f"{name}.weight" if name else "weight" for name, m in base_layer.named_modules() if m is self.module
        )

    def matrix(self) -> Tensor:
        """W, all dimensions but the first as one."""
        return self.weight.detach().flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """W in the shape of the weight."""
        return matrix.reshape(self.weight.shape)

    def set_matrix(self, matrix: Tensor) -> None:
        """Replace the weight parameter by a new one."""
        weight = self.stored(matrix).contiguous().to(self.weight)
        self.module.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    def restore(self, weight: nn.Parameter) -> None:
        """The very parameter object, so ties to other modules are ties again."""
        self.module.weight = weight


def widen(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
