"""Which parameters of a model were trainable before it had adapters."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn


class Flags(WeakKeyDictionary[nn.Module, dict[str, bool]]):
    """`requires_grad` of the parameters of a model, by the name of each in its own module.

    A parameter is exchanged for another when a model is sharded, moved or cast, and torch cannot move one of torchao's
    or a DTensor to which there are weak references. So the modules are remembered.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Flags:
        """Those of all modules of a model as they are now."""
        return cls(
            {m: {name: p.requires_grad for name, p in m.named_parameters(recurse=False)} for m in model.modules()}
        )

    def restore(self) -> None:
        """Set them again, where a module still has a parameter of that name."""
        for module, flags in self.items():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point():  # others, as of packed weights, have no gradient
                    parameter.requires_grad_(flags.get(name, parameter.requires_grad))
