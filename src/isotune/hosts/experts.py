"""The experts of a mixture as hosts: a parameter (experts, out, in) or (experts, in, out), with one W per expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.hosts.host import Fold, Host, widen
from isotune.internals.torch_state import is_symbolic
from isotune.parallel.sharding import shape_of


class ExpertsHost(Host):
    """One parameter of a module of experts; all its matrices have a leading dimension of experts.

    Adapters change the parameter, which the module's own forward then uses, so every implementation works. Only experts
    that receive tokens are folded.

    Args:
        module: a module as in transformers, whose attribute `is_transposed` says how the weights are laid out.
        name: name of the parameter in the model, for messages.
        parameter: name of the parameter in the module.
    """

    folds = True
    dimensions = 3

    def __init__(self, module: nn.Module, name: str, parameter: str) -> None:
        self.parameter = parameter
        self.transposed = bool(getattr(module, "is_transposed", False))
        super().__init__(module, name)

    def check(self) -> None:
        """Also refuse a module that does not say how its weights are laid out."""
        super().check()
        if not hasattr(self.module, "is_transposed"):
            raise ValueError(
                f"The layout of {self.name!r} is not known: its module, a {type(self.module).__module__}."
                f"{type(self.module).__qualname__}, has no attribute is_transposed, which says whether an expert's "
                "weight is (out, in) or (in, out). Take it out of target_parameters."
            )

    @property
    def experts(self) -> int:
        """The number of experts."""
        return shape_of(self.weight)[0]

    def folded(self, fold: Fold, arguments: tuple[Any, ...]) -> Tensor:
        """The parameter with the adapters folded in for the experts that receive tokens."""
        weight, reached = self.weight, self._reached(arguments)
        if reached is None:
            return super().folded(fold, arguments).contiguous()
        if len(reached) == 0:
            return weight
        matrices = fold(widen(self.seen(weight.index_select(0, reached))), at=reached)
        folded = self.stored(matrices).to(weight.dtype).contiguous()
        return folded if len(reached) == self.experts else weight.index_copy(0, reached, folded)

    def _reached(self, arguments: tuple[Any, ...]) -> Tensor | None:
        """The experts to which the router sends tokens; None for all, if that cannot be known."""
        integers = (torch.int64, torch.int32)
        found = [value for value in arguments if isinstance(value, Tensor) and value.dtype in integers]
        if len(found) != 1 or is_symbolic(found[0]) or torch.compiler.is_compiling():
            return None
        reached: Tensor = torch.unique(found[0]).long()
        return reached[(reached >= 0) & (reached < self.experts)]  # others stand for experts of another device
