"""nn.Linear and the transposed Conv1D of GPT-2 as hosts."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from isotune.hosts.host import Host


def _conv1d() -> Any:
    # transformers need not be imported: a module of its class only exists if it already is.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())


class LinearHost(Host):
    """A linear layer, y = x Wᵀ + b; the weight is stored as W (nn.Linear) or as Wᵀ (Conv1D)."""

    kinds = ("torch.nn.Linear", "transformers.pytorch_utils.Conv1D")
    modules = (nn.Linear,)

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.transposed = not isinstance(module, nn.Linear)
        inherited: Any = _conv1d() if self.transposed else nn.Linear
        self.multiplies = type(module).forward is inherited.forward  # a subclass may compute something else
        super().__init__(module, name)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether a module is an nn.Linear or a Conv1D."""
        return isinstance(module, (*cls.modules, _conv1d()))

    def check(self) -> None:
        """Also refuse a layer that is never called."""
        super().check()
        if isinstance(self.module, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"The target module {self.name!r} is the output projection of torch's nn.MultiheadAttention, which "
                "reads its weight and never calls it, so an adapter would have no effect. Exclude it with "
                "exclude_modules."
            )
