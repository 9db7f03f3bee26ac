"""Where an optimiser keeps what it knows of each parameter: in its own state, or in that of an optimiser inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import nn
from torch.optim import LBFGS

Store = MutableMapping[Any, Any]
"""Parameter -> the state that an optimiser keeps for it."""


def held_by(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """The first of these parameters that an optimiser does not have; None if it has all."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return next((name for name, parameter in parameters.items() if id(parameter) not in own), None)


def stores_of(optimizer: Any) -> list[Store]:
    """The states of an optimiser and of all optimisers inside it, each once.

    torch's ZeroRedundancyOptimizer keeps its moments in the optimiser inside it, a process its share of them; SAM and
    others that wrap an optimiser keep theirs beside those of it; accelerate's shows those of the one inside as its own.
    """
    found: list[Store] = []
    for one in _with_inner(optimizer):
        if not any(one.state is store for store in found):
            found.append(one.state)
    return found


def why_hidden(optimizer: Any, parameters: Mapping[str, nn.Parameter], *, reset: bool) -> str | None:
    """Why what an optimiser keeps for these parameters cannot be found; None if it can, or if it keeps nothing.

    An optimiser may keep nothing for them, as SGD without momentum and as any does before its first step. So it is
    refused only where it has state for what is no parameter of its own, or for a neighbour of one that has a gradient.

    Args:
        reset: whether an earlier move has reset what it kept, which a skipped step leaves so.
    """
    optimisers = list(_with_inner(optimizer))
    if any(isinstance(one, LBFGS) for one in optimisers):
        return (
            "LBFGS keeps one history for all its parameters together, of which no part is theirs alone. Use another "
            "optimiser, such as AdamW, or 'keep' with a new LBFGS after each move."
        )
    if reset or any(parameter in one.state for one in optimisers for parameter in parameters.values()):
        return None
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in parameters.values() if parameter.grad is not None}
    groups = [(group["params"], one.state) for one in optimisers for group in one.param_groups]
    if any(id(key) not in own for one in optimisers for key in one.state) or any(
        any(id(p) in trained for p in group) and any(p in store for p in group) for group, store in groups
    ):
        return (
            f"this optimiser of type {type(optimizer).__name__} has a state in which nothing is kept under these "
            "parameters, and so has any optimiser inside it. Give the schedule an optimiser that keeps a state for "
            "each parameter, or use 'keep'."
        )
    return None


def _with_inner(optimizer: Any) -> Iterator[Any]:
    """An optimiser and all that it holds in an attribute, or in a list or a dictionary there, each once."""
    pending, seen = [optimizer], set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if _is_optimiser(one):
            yield one
        for value in getattr(one, "__dict__", {}).values():
            inner = value.values() if isinstance(value, Mapping) else value
            pending += filter(_is_optimiser, inner if isinstance(value, (Mapping, list, tuple)) else (value,))


def _is_optimiser(value: Any) -> bool:
    """Whether a value has what torch's optimisers have; the functional ones in torch are of no common class."""
    groups, state = getattr(value, "param_groups", None), getattr(value, "state", None)
    return isinstance(groups, list) and isinstance(state, MutableMapping)
