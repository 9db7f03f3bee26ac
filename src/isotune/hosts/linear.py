"""nn.Linear and the transposed Conv1D of GPT-2 as hosts."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class Host(ABC):
    """A frozen layer seen as a matrix W of shape (out, in)."""

    kinds: ClassVar[tuple[str, ...]]

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

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return int(self.matrix().shape[1])

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return int(self.matrix().shape[0])


def _is_conv1d(module: nn.Module) -> bool:
    # transformers stays unimported: a module of its class can exist only if somebody else has imported it.
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


class LinearHost(Host):
    """y = x Wᵀ + b; the weight is stored as W (nn.Linear) or as Wᵀ (Conv1D).

    Raises:
        ValueError: the weight is not a floating-point matrix.
    """

    kinds = ("torch.nn.Linear", "transformers.pytorch_utils.Conv1D")

    def __init__(self, module: nn.Module, name: str = "") -> None:
        super().__init__(module, name)
        self.transposed = not isinstance(module, nn.Linear)
        weight = self.weight
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"The weight of {name or type(module).__name__!r} has shape {tuple(weight.shape)} and dtype "
                f"{weight.dtype}; a floating-point matrix is needed. A quantised or packed layer cannot be adapted "
                "by this class: load the base model unquantised, or exclude the layer with exclude_modules."
            )

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """nn.Linear, its subclasses that keep a plain weight, and Conv1D."""
        return isinstance(module, nn.Linear) or _is_conv1d(module)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter named weight."""
        weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return weight

    def matrix(self) -> Tensor:
        """W as (out, in)."""
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """W, or Wᵀ for Conv1D."""
        return matrix.T if self.transposed else matrix

    def set_matrix(self, matrix: Tensor) -> None:
        """Replace the weight parameter by a new one."""
        weight = self.stored(matrix).contiguous().to(self.weight)
        self.module.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    def restore(self, weight: nn.Parameter) -> None:
        """The very parameter object, so ties to other modules are ties again."""
        self.module.weight = weight
