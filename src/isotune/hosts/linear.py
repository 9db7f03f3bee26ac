"""nn.Linear and the transposed Conv1D of GPT-2 as hosts."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from isotune.hosts.host import Host


def _conv1d() -> Any:
    # transformers stays unimported: a module of its class can exist only if somebody else has imported it.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())


class LinearHost(Host):
    """y = x Wᵀ + b; the weight is stored as W (nn.Linear) or as Wᵀ (Conv1D)."""

    kinds = ("torch.nn.Linear", "transformers.pytorch_utils.Conv1D")

    def __init__(self, module: nn.Module, name: str = "") -> None:
        super().__init__(module, name)
        if isinstance(module, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"The target module {name!r} is the output projection of torch's nn.MultiheadAttention, which reads "
                "its weight and never calls it, so an adapter would do nothing. Exclude it with exclude_modules."
            )
        self.transposed = not isinstance(module, nn.Linear)
        inherited: Any = _conv1d() if self.transposed else nn.Linear
        self.multiplies = type(module).forward is inherited.forward  # a subclass may compute something else

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """nn.Linear, its subclasses that keep a plain weight, and Conv1D."""
        return isinstance(module, (nn.Linear, _conv1d()))
