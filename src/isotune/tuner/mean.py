"""Weighted combinations of adapters of one method on one basis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from isotune.methods.config import IsotuneConfig, type_of
from isotune.tuner.layer import Layer

_SAME_BASIS = 1e-5
_ELSE = "To use them together, call base_model.set_adapter([...]), which composes them in that order."


def check_request(
    adapters: Sequence[str], weights: Sequence[float], adapter_name: str, configs: Mapping[str, IsotuneConfig]
) -> None:
    """Refuse names, weights and methods that cannot be combined.

    Raises:
        ValueError: they cannot; says which and why.
    """
    unknown = [name for name in adapters if name not in configs]
    if unknown or not adapters or len(set(adapters)) < len(adapters):
        raise ValueError(
            f"adapters={list(adapters)} must name at least one adapter, each once; this model has {list(configs)}."
        )
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)} must be one finite number for each of the {len(adapters)} adapters.")
    if adapter_name in configs:
        raise ValueError(f"An adapter {adapter_name!r} already exists; choose another name, or delete it first.")
    types = {name: type_of(configs[name]) for name in adapters}
    if len(set(types.values())) > 1:
        raise ValueError(f"Adapters of different methods have no weighted mean: {types}. {_ELSE}")
    for name in adapters:
        config = configs[name]
        if config.modules_to_save or config.bias != "none":
            raise ValueError(
                f"{name!r} has modules_to_save={config.modules_to_save} and bias={config.bias!r}; only adapters with "
                "modules_to_save=None and bias='none' can be combined."
            )


def combine(
    layers: Mapping[str, Layer], adapters: Sequence[str], weights: Sequence[float]
) -> dict[str, dict[str, Tensor]]:
    """Compute the parameters of the weighted mean of adapters: module -> parameter -> value, float64.

    Rotations are averaged on the rotation group (`rotation_mean`), scales and gains geometrically, free matrices and
    angles linearly. Weights that sum to less than one leave the rest to the base model.

    Args:
        layers: the layers that hold any of the adapters, by name.
        adapters: names of one or more adapters.
        weights: one weight per adapter.

    Raises:
        ValueError: the adapters differ in modules, shapes, options, scale or basis, or their method has no mean; says
            what differs and where.
    """
    first = adapters[0]
    result = {}
    for name, layer in layers.items():
        absent = [adapter for adapter in adapters if adapter not in layer.isotune_operator]
        if absent:
            raise ValueError(f"{absent[0]!r} does not adapt {name!r}, which other adapters do. {_ELSE}")
        for adapter in adapters:
            if (scale := layer.adapter(adapter).relative_scale) != 1.0:
                raise ValueError(
                    f"{adapter!r} has the scale {scale:g} in {name!r}, but only adapters as trained can be averaged; "
                    "set its scale to 1 first."
                )
        for other in adapters[1:]:
            difference = _difference(layer, first, other)
            if difference:
                raise ValueError(f"{first!r} and {other!r} have {difference} in {name!r}, hence no mean. {_ELSE}")
        try:
            result[name] = _mean(layer, adapters, torch.tensor(weights, dtype=torch.float64))
        except ValueError as error:
            names = ", ".join(map(repr, adapters))
            raise ValueError(f"{names} cannot be combined in {name!r}: {error}. {_ELSE}") from None
    return result


def _difference(layer: Layer, first: str, other: str) -> str | None:
    """How two adapters on a layer differ, apart from the values of their parameters; None if they do not."""
    one, two = layer.adapter(first), layer.adapter(other)
    shapes = [{name: tuple(p.shape) for name, p in operator.named_parameters()} for operator in (one, two)]
    if shapes[0] != shapes[1]:
        return f"different sizes ({shapes[0]} and {shapes[1]})"
    if one.batch_key() != two.batch_key():
        return "different options"
    if one.side != two.side:
        return f"different sides ({one.side} and {two.side})"
    if not one.additive:
        return None
    one, two = layer.subspace(first), layer.subspace(other)
    if one.power != two.power or layer.bases(first)[0].embedded != layer.bases(other)[0].embedded:
        return "different options (basis or the split of the singular values)"
    if one.scale != two.scale:
        return f"different scales ({one.scale:g} and {two.scale:g})"
    # With another seed the pins of one basis differ too.
    held = layer.stored_of(first), layer.stored_of(other)
    if [tensor.shape for tensor in held[0]] != [tensor.shape for tensor in held[1]]:
        return "different updates accumulated on earlier subspaces, as at least one has moved"
    if not all(map(_close, *held)):
        return "different bases of the principal subspace (solved on another machine or base, or moved)"
    return None


def _close(one: Tensor, two: Tensor) -> bool:
    """Whether two bases are equal up to rounding, as from another number of threads; flipped signs are not."""
    return float(torch.linalg.vector_norm(one - two)) <= _SAME_BASIS * float(torch.linalg.vector_norm(one))


def _mean(layer: Layer, adapters: Sequence[str], weights: Tensor) -> dict[str, Tensor]:
    operators = [layer.adapter(adapter) for adapter in adapters]
    means = operators[0].averages
    names = [name for name, _ in operators[0].named_parameters()]
    without = [name for name in names if name not in means]
    if without:
        raise ValueError(
            f"{type(operators[0]).__name__} with {', '.join(without)} has no mean of the same form: its factors are "
            "not unique, or the mean of two would need more of them"
        )
    by_name = [dict(operator.named_parameters()) for operator in operators]
    weights = weights.to(next(iter(by_name[0].values())).device)
    return {
        name: means[name](torch.stack([parameters[name].detach() for parameters in by_name]), weights) for name in names
    }
