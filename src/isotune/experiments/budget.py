"""Equal parameter budgets: the rank or block size at which a method's adapter is nearest to a number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from isotune.experiments.recipe import Method
from isotune.experiments.registry import entry

_LARGEST = 1 << 16


def match(method: Method, target: int, count: Callable[[Method], int]) -> Method:
    """`method` with the size at which `count` of it is nearest to `target` parameters, the lower of two as near.

    It stays as it is where it has a size in its options, or none to choose. `count` raises ValueError for a size that
    does not fit the model.
    """
    known = entry(method.name)
    option = known.size_option
    if option is None or option in method.options:
        return method
    counted: dict[int, int | None] = {}

    def parameters(size: int) -> int | None:
        if size not in counted:
            try:
                counted[size] = count(sized(size))
            except ValueError:
                counted[size] = None
        return counted[size]

    def sized(size: int) -> Method:
        return Method.model_validate({**method.model_dump(), option: size})

    if option == "r":
        _bisect(parameters, target, known.size_step)
    else:
        # Blocks must divide the inputs of every layer, so that few sizes fit, all of them quickly counted.
        for size in range(2, 257):
            found = parameters(size)
            if found is not None and found > 2 * target:
                break
    fitting = {size: found for size, found in counted.items() if found is not None}
    if not fitting:
        return method
    return sized(min(fitting, key=lambda size: (abs(fitting[size] - target), size)))


def _bisect(parameters: Callable[[int], int | None], target: int, step: int) -> None:
    """Look at the ranks around the one where the parameters, which grow with it, pass `target`."""
    low, high = 1, 2

    def above(steps: int) -> bool:
        found = parameters(steps * step)
        return found is None or found > target

    if above(low):
        return
    while high < _LARGEST and not above(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle) else (middle, high)


def counter(model: Any, head: list[str], peft_type: str | None) -> Callable[[Method], int]:
    """What counts the parameters of a method's adapter on a model, those of the modules in `head` left out.

    The model is moved to the meta device: it has only shapes from then on, and nothing is computed.
    """
    import copy

    import torch

    from isotune.experiments.loop import is_head
    from isotune.experiments.methods import attach
    from isotune.files.base_model import quiet

    bare = model.to("meta")

    def count(method: Method) -> int:
        with quiet(), torch.device("meta"):
            adapted = attach(method, copy.deepcopy(bare), head, peft_type)
        return sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and not is_head(n, head))

    return count
