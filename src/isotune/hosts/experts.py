"""The experts of a mixture as hosts: a parameter (experts, out, in) or (experts, in, out), one W an expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.hosts.host import Fold, WeightHost, widen
from isotune.internals.torch_state import is_symbolic
from isotune.parallel.sharding import shape_of


class ExpertsHost(WeightHost):
    """One parameter of a module of experts; `matrix` and all that takes or gives one has the experts in front.

    Adapters change the parameter, from which the module's own forward then computes, so every implementation of it is
    right. Only the experts that some token is sent to are folded.

    Args:
        module: of transformers' kind: its attribute `is_transposed` says how the weights are laid out.
        name: of the parameter in the model, for messages.
        parameter: its name in the module.

    Raises:
        ValueError: the parameter has not three dimensions, is not floating-point, or its layout is not known.
    """

    kinds = ("modules of experts (target_parameters)",)
    folds = True
    dimensions = 3

    def __init__(self, module: nn.Module, name: str, parameter: str) -> None:
        self.parameter = parameter
        super().__init__(module, name)
        if not hasattr(module, "is_transposed"):
            raise ValueError(
                f"The layout of {name!r} is not known: its module, a {type(module).__module__}."
                f"{type(module).__qualname__}, does not say by is_transposed whether the weight of an expert is "
                "(out, in) or (in, out). Take it out of target_parameters."
            )
        self.transposed = bool(module.is_transposed)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Always False: experts are chosen by parameter name (`target_parameters`), not by module."""
        return False

    @property
    def experts(self) -> int:
        """How many there are."""
        return shape_of(self.weight)[0]

    def seen(self, weight: Tensor) -> Tensor:
        """The weight as all W, (experts, out, in)."""
        return self.stored(weight)

    def stored(self, matrix: Tensor) -> Tensor:
        """(…, out, in) in the layout of the parameter, and back."""
        return matrix.mT if self.transposed else matrix

    def call_folded(self, base_layer: nn.Module, fold: Fold, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts with the parameter folded for those that are reached, rounded once to its own dtype."""
        self.refuse_gathered_at_calls()
        weight, reached = self.weight, self._reached((*args, *kwargs.values()))
        if reached is not None and len(reached) == 0:
            return base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        chosen = weight if reached is None else weight.index_select(0, reached)
        folded = fold(widen(self.stored(chosen)), None, reached)
        folded = self.stored(folded).to(weight.dtype).contiguous()
        if reached is not None and len(reached) < self.experts:
            folded = weight.index_copy(0, reached, folded)
        return self.call_with(base_layer, folded, x, *args, **kwargs)

    def _reached(self, arguments: tuple[Any, ...]) -> Tensor | None:
        """Which experts the router sends tokens to; None for all, where that cannot be known."""
        integers = (torch.int64, torch.int32)
        found = [value for value in arguments if isinstance(value, Tensor) and value.dtype in integers]
        if len(found) != 1 or is_symbolic(found[0]) or torch.compiler.is_compiling():
            return None
        reached: Tensor = torch.unique(found[0]).long()
        return reached[(reached >= 0) & (reached < self.experts)]  # others stand for experts of another device
