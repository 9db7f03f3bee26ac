"""One move of all subspaces of an adapter: everything is computed first and exchanged at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import without_autocast
from isotune.adapter.placement import Placement
from isotune.adapter.update import PlacedUpdate
from isotune.hosts import widen
from isotune.internals.offloading import is_managed
from isotune.moving.optimiser import between, project
from isotune.moving.stores import Store, held_by, stores_of, why_hidden
from isotune.parallel.processes import one_for_all, sample_of, several
from isotune.parallel.sharding import is_partitioned, is_sharded, is_wrapped_by_fsdp
from isotune.progress import bar
from isotune.subspace.lowrank import joined
from isotune.subspace.selection import generator_for
from isotune.tuner.adapted_model import AdaptedModel
from isotune.tuner.experts_layer import ExpertsLayer
from isotune.tuner.layer import Layer
from isotune.tuner.moved import update_config

Choose = Callable[[Tensor, Layer], Tensor]
"""choose(current weight (out, in), layer) -> the next basis (r, in)."""


@dataclass(frozen=True)
class Move:
    """What happened at one boundary."""

    number: int
    """The number of the boundary, from 1; 0 for one before the first step."""
    done: int
    """How many steps or epochs were finished."""
    ranks: Mapping[str, int]
    """Layer name -> rank of its accumulated update."""
    errors: Mapping[str, float]
    """Layer name -> share of the accumulated update, in the Frobenius norm, that was cut off to keep to `max_rank`."""

    @property
    def error(self) -> float:
        """The largest error of a layer; 0 if nothing was cut."""
        return max(self.errors.values(), default=0.0)

    @property
    def worst(self) -> str:
        """The layer with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])


@dataclass(frozen=True)
class _Next:
    """The values of one layer after a move, on its device."""

    layer: Layer
    buffers: dict[str, Tensor | None]
    placement: Placement
    values: Mapping[str, Tensor]
    """Parameter name -> the value at which it starts again."""
    error: float


_State = tuple[Store, nn.Parameter, dict[str, Any]]
"""Where an optimiser keeps the state of a parameter, the parameter, and that state after a move."""


def adapted(model: nn.Module) -> AdaptedModel:
    """The object that knows all isotune layers of a model, however it is wrapped.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        own = AdaptedModel.ready(module)
        if own is not None:
            return own
    raise ValueError(f"The model, a {type(model).__name__}, has no isotune adapter whose subspaces could move.")


def layers_of(
    model: nn.Module, adapter_name: str, obstacle: Callable[[Layer, bool], str | None], refusal: str
) -> list[Layer]:
    """The layers of an adapter, unless `obstacle(layer, whole model in this process)` says why not on one of them.

    Raises:
        ValueError: the refusal with its three places filled, by the adapter, the layer and the obstacle; or the model
            has no such adapter.
    """
    own = adapted(model)
    layers = own.layers_with(adapter_name)
    if not layers:
        raise ValueError(f"The model has no isotune adapter {adapter_name!r}.")
    whole = own.model is not None and not is_wrapped_by_fsdp(model) and not is_wrapped_by_fsdp(own.model)
    for layer in layers:
        if why := obstacle(layer, whole):
            raise ValueError(refusal.format(repr(adapter_name), repr(layer.key), why))
    return layers


def layers_to_move(model: nn.Module, adapter_name: str, optimizer: Any, optimizer_state: str) -> list[Layer]:
    """The layers of an adapter, if all of them can move now, and what the optimiser keeps for them as is asked.

    Raises:
        ValueError: they cannot; says why and what to do.
    """
    refusal = "The subspace of {} on {} cannot move: {}"
    layers = layers_of(model, adapter_name, partial(_why_fixed, adapter_name), refusal)
    trained = {
        f"{layer.key}.{name}": parameter
        for layer in layers
        for name, parameter in layer.adapter(adapter_name).named_parameters()
        if parameter.requires_grad
    }
    if not trained:
        raise ValueError(f"The adapter {adapter_name!r} is not trained: activate it with set_adapter first.")
    if (absent := held_by(optimizer, trained)) is not None:
        raise ValueError(
            f"The optimiser does not have {absent}, a parameter of {adapter_name!r}, so what it keeps for it would not "
            "move. Give the schedule the optimiser that trains the adapter. DeepSpeed's optimisers train copies of "
            "their own, with which subspaces cannot move: use DDP, or one process."
        )
    moved = any(layer.accumulated(adapter_name) is not None for layer in layers)
    if optimizer_state != "keep" and (why := why_hidden(optimizer, trained, reset=moved)) is not None:
        raise ValueError(f"optimizer_state={optimizer_state!r} is not possible for {adapter_name!r}: {why}")
    return layers


def _why_fixed(adapter_name: str, layer: Layer, whole: bool) -> str | None:
    """Why the subspace of an adapter on a layer cannot move; None if it can."""
    adapter, parameters = layer.adapter(adapter_name), list(layer.adapter(adapter_name).parameters())
    if not isinstance(adapter, PlacedUpdate):
        return "its method has no subspace. Use PSOFT, LoRA-XS, SVFit, CERSA, ROSA or PESO."
    if isinstance(layer, ExpertsLayer):
        return "those of experts stay where they are. Leave target_parameters empty."
    if layer.host.stands_in:
        return "truncate_base has truncated its weight, and the other directions are gone. Use CERSA without it."
    if not whole or any(is_sharded(one) or is_partitioned(one) for one in (layer.base_weight, *parameters)):
        return "the model is spread over processes (FSDP, ZeRO-3 or tensor parallelism). Use DDP, or one process."
    if is_managed(layer.host.module):
        return "its weight is offloaded and only brought for each call. Load the model without offloading."
    if layer.merged:
        return "an adapter is merged into the layer. Call unmerge_adapter() first."
    if adapter.relative_scale != 1.0:
        return f"it has the scale {adapter.relative_scale:g}, and only adapters as trained move. Set its scale to 1."
    return adapter.fixed


@torch.no_grad()
def move(
    model: nn.Module,
    optimizer: Any,
    adapter_name: str,
    choose: Choose,
    *,
    number: int,
    done: int,
    optimizer_state: str,
    max_rank: int | None,
    seed: int = 0,
) -> Move:
    """Fold the update of each layer into its accumulated one and go on in the next subspace; the function stays.

    Args:
        model: the model.
        optimizer: the optimiser that trains the adapter.
        adapter_name: the adapter.
        choose: the choice of the next basis.
        number, done: as in `Move`.
        optimizer_state: "reset", "keep" or "project".
        max_rank: the largest rank of an accumulated update; None for no limit.
        seed: of what a method draws at random where it starts again.

    Raises:
        ValueError: as in `layers_to_move`, or the choice or the projection is not possible. Nothing is changed then,
            nor by any other exception.
    """
    layers = layers_to_move(model, adapter_name, optimizer, optimizer_state)
    own = adapted(model)
    own.place()
    found = _next_of_all(layers, adapter_name, choose, number, max_rank, seed)
    stores = stores_of(optimizer)
    states = [state for one in found for state in _states(stores, one, adapter_name, optimizer_state)]
    _exchange(own, adapter_name, found, states)
    ranks = {one.layer.key: one.placement.accumulated for one in found}
    return Move(number, done, ranks, {one.layer.key: one.error for one in found})


def _next_of_all(
    layers: Sequence[Layer], adapter_name: str, choose: Choose, number: int, max_rank: int | None, seed: int
) -> list[_Next]:
    """The next values of all layers, the same in all processes."""

    def make() -> list[Tensor]:
        shown = bar(layers, desc="next subspaces", unit="weight")
        return [tensor for layer in shown for tensor in _computed(layer, adapter_name, choose, max_rank)]

    same = [(layer.key, sample_of(layer.base_weight)) for layer in layers] if several() else []
    tensors = iter(one_for_all(f"move {number} of {adapter_name}: {same}", make))
    return [_placed(layer, adapter_name, [next(tensors) for _ in range(4)], number, seed) for layer in layers]


def _computed(layer: Layer, adapter_name: str, choose: Choose, max_rank: int | None) -> list[Tensor]:
    """U, D, V', all float32, and the error, float64, for one layer."""
    adapter, matrix = layer.subspace(adapter_name), layer.unmerged_matrix()
    with without_autocast(matrix):
        up, down = adapter.low_rank(matrix)
        own = len(down) - adapter.accumulated_rank
        updates = [(up[:, :own], down[:own])]
        # The accumulated factors as stored, since those of the placement have been rounded to the dtype of W.
        if (accumulated := layer.accumulated(adapter_name)) is not None:
            updates.insert(0, tuple(factor.to(up) for factor in accumulated))  # type: ignore[arg-type]
        if not all(torch.isfinite(factor).all() for factor in updates[-1]):
            raise ValueError(
                f"The update of {adapter_name!r} on {layer.key!r} holds NaN or infinity, so it cannot be accumulated: "
                "its training has diverged. Go on from an earlier checkpoint with a lower learning rate."
            )
        whole = joined(updates, rank=max_rank)
        new_up, new_down = (factor.float().to(matrix.device).contiguous() for factor in (whole.up, whole.down))
        current = widen(matrix)
        current = current + new_up.to(current) @ new_down.to(current)
        basis = choose(current, layer).float().contiguous()
    return [new_up, new_down, basis, torch.tensor(whole.missing / whole.norm if whole.norm else 0.0).double()]


def _placed(layer: Layer, adapter_name: str, tensors: Sequence[Tensor], number: int, seed: int) -> _Next:
    """The layer's next placement, on its device and on the very tensors that will be stored."""
    adapter, matrix = layer.subspace(adapter_name), layer.unmerged_matrix()
    up, down, basis = (tensor.to(matrix.device) for tensor in tensors[:3])
    placement = adapter.placed(basis, matrix, [basis, up, down], layer.base_weight, (up, down))
    moves = torch.tensor(float(number), device=matrix.device)
    buffers: dict[str, Tensor | None] = {"pin": None, "basis": basis, "up": up, "down": down, "moves": moves}
    values = adapter.start(placement, generator_for(seed, number, layer.key))
    return _Next(layer, buffers, placement, values, float(tensors[3]))


def _states(stores: Sequence[Store], found: _Next, adapter_name: str, treatment: str) -> list[_State]:
    """The next state of each parameter that has one and does not keep it; an empty one stands for none."""
    adapter = found.layer.subspace(adapter_name)
    own = [(store, name, p) for store in stores for name, p in adapter.named_parameters() if store.get(p)]
    if treatment == "keep":
        return []
    if treatment == "reset":
        return [(store, parameter, {}) for store, _, parameter in own]
    overlap = between(adapter, found.placement, found.values)
    return [(store, p, project(adapter, name, store[p], overlap)) for store, name, p in own]


def _exchange(
    own: AdaptedModel,
    adapter_name: str,
    found: Sequence[_Next],
    states: Sequence[_State],
) -> None:
    """Exchange everything, or nothing: whatever interrupts it, the old values are put back."""
    with ExitStack() as undo:
        for one in found:
            layer, adapter, basis = one.layer, one.layer.subspace(adapter_name), one.layer.bases(adapter_name)[0]
            undo.callback(basis.hold, basis.held())
            undo.callback(setattr, adapter, "placement", adapter.placement)
            undo.callback(layer.configs.__setitem__, adapter_name, layer.configs[adapter_name])
            for parameter in adapter.parameters():
                undo.callback(parameter.copy_, parameter.detach().clone())
            basis.hold(one.buffers)
            for name, value in one.values.items():
                adapter.get_parameter(name).copy_(value)
            adapter.placement = one.placement
        for store, parameter, state in states:
            undo.callback(store.__setitem__, parameter, store[parameter])
            if state:
                store[parameter] = state
            else:
                del store[parameter]
        configs: dict[str, Any] = getattr(own.model, "peft_config", {})
        undo.callback(configs.update, {name: configs[name] for name in configs if name == adapter_name})
        update_config(configs, [one.layer for one in found], adapter_name)
        undo.pop_all()
    for one in found:
        for parameter in one.layer.adapter(adapter_name).parameters():
            parameter.grad = None  # with respect to coordinates that are gone
