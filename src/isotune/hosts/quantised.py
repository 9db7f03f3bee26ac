"""A linear layer whose weight has been quantised, by any supported library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isotune.hosts.host import Host, Kept
from isotune.internals.quantised_state import copy_of, copy_to_write, exchange_weight, keep_readable, packed

_ROWS = 256
"""How many rows of the identity a kernel multiplies at a time."""


class Backend(Protocol):
    """How one library's weights are read and written; PEFT's quantisation back ends have this interface."""

    @property
    def backend_name(self) -> str:
        """The name of the library and its number format, for messages."""

    @property
    def supports_merge(self) -> bool:
        """Whether `set_base_weight` works."""

    def get_base_weight(self, base_layer: nn.Module, /) -> Tensor:
        """W as (out, in), dequantised."""

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor, /) -> None:
        """Quantise W (out, in) as the layer was, into `peft_layer.base_layer`, which may be replaced."""


def _cannot_write(peft_layer: Any, matrix: Tensor) -> None:
    """Placeholder where `supports_merge` is False."""


@dataclass(frozen=True)
class Functions:
    """A back end for a library that PEFT does not support or cannot read."""

    backend_name: str
    get_base_weight: Callable[[Any], Tensor]
    supports_merge: bool = False
    set_base_weight: Callable[[Any, Tensor], None] = _cannot_write


def functions_for(module: nn.Module, name: str = "") -> Functions | None:
    """The back end for a layer quantised by optimum-quanto, which PEFT does not support; None for any other module.

    Args:
        module: any module.
        name: its name in the model, for messages.

    Raises:
        ValueError: the layer is not frozen, or its activations are quantised too.
    """
    # The library need not be imported: a module of its class only exists if it already is.
    quanto: Any = sys.modules.get("optimum.quanto")
    if quanto is None or not isinstance(module, quanto.QLinear):
        return None
    if module.activation_qtype is not None:
        raise ValueError(
            f"{name!r} is quantised by optimum-quanto including its activations, which adapters do not support; "
            "quantise only weights, or exclude the module with exclude_modules."
        )
    if not module.frozen:
        raise ValueError(
            f"{name!r} is quantised by optimum-quanto but not frozen yet: call optimum.quanto.freeze(model) first."
        )
    return Functions("optimum-quanto", lambda layer: layer.weight.dequantize(), True, _write_quanto)


def _write_quanto(peft_layer: Any, matrix: Tensor) -> None:
    layer = peft_layer.get_base_layer()
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    layer.freeze()
    layer.weight.requires_grad_(False)


@torch.no_grad()
def product_with_identity(layer: Any) -> Tensor:
    """W from a kernel that can only multiply: its products with rows of the identity matrix, a few at a time.

    This is exact whatever the kernel and its layout, since each result is one weight plus zeros.
    """
    numbers: Tensor = layer.scales
    bias, layer.bias = layer.bias, None
    try:
        parts = []
        for start in range(0, layer.in_features, _ROWS):
            stop = min(start + _ROWS, layer.in_features)
            part = torch.zeros(stop - start, layer.in_features, dtype=numbers.dtype, device=numbers.device)
            part.diagonal(start).fill_(1)
            parts.append(layer(part))
    finally:
        layer.bias = bias
    return torch.cat(parts).T.contiguous()


class QuantisedHost(Host):
    """A linear layer with packed weights: W is the dequantised weight; the layer's own forward uses the packed one."""

    kinds = ("linear layers quantised by bitsandbytes", "torchao", "optimum-quanto", "hqq", "gptqmodel", "aqlm")
    quantised = True

    def __init__(self, module: nn.Module, name: str, backend: Backend) -> None:
        super().__init__(module, name)
        self.backend = backend
        keep_readable(module)

    def check(self) -> None:
        """Check nothing: `matrix` refuses a weight that cannot be read."""

    @property
    def weight(self) -> Tensor:
        """The packed weight."""
        return packed(self.module)

    def shape(self) -> tuple[int, int]:
        """The shape of W as the layer states it, since its weight is packed."""
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """W as (out, in), dequantised at each call.

        Raises:
            ValueError: the library cannot dequantise it.
        """
        try:
            matrix = self.backend.get_base_weight(self.module).detach()
        except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"The weight of {self.name!r}, quantised by {self.backend.backend_name}, cannot be dequantised: "
                f"{error or type(error).__name__}. Quantise the model first (bitsandbytes does when it is moved to its "
                "device), or exclude the module with exclude_modules."
            ) from error
        if matrix.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"The weight of {self.name!r}, quantised by {self.backend.backend_name}, dequantises to "
                f"{tuple(matrix.shape)}, but the layer is {self.out_features} × {self.in_features}; exclude the module "
                "with exclude_modules."
            )
        return matrix

    def check_merge(self) -> None:
        """Refuse a library that cannot write back."""
        if not self.backend.supports_merge:
            raise ValueError(
                f"{self.name!r} is quantised by {self.backend.backend_name}, to which a changed weight cannot be "
                "written back, so adapters cannot be merged into it; nothing was merged. Use the model with the "
                "adapter unmerged, or export the adapter as LoRA. A torchao model must be loaded by transformers with "
                "a TorchAoConfig, which says how to quantise it again."
            )

    def set_matrix(self, matrix: Tensor) -> None:
        """Quantise `matrix` as the layer was, in new tensors."""
        bias = getattr(self.module, "bias", None)
        copied = copy_to_write(self.module)
        holder = SimpleNamespace(base_layer=copied, get_base_layer=lambda: copied)  # like one of PEFT's layers
        self.backend.set_base_weight(holder, matrix)
        exchange_weight(self.module, holder.base_layer)
        if bias is not None:
            self.module.bias = bias  # HQQ drops it

    def keep(self) -> Kept:
        """Save the weight and everything that belongs to it."""
        return Kept(self.weight, copy_of(self.module))

    def restore(self, kept: Kept) -> None:
        """Put the same tensors back, on the layer's current device and in its dtype."""
        assert kept.module is not None
        now, then = self.weight, packed(kept.module)
        if then.device != now.device or (now.is_floating_point() and then.dtype != now.dtype):
            kept.module.to(now.device, now.dtype if now.is_floating_point() else None)
        exchange_weight(self.module, kept.module)
