"""Weighted combinations of adapters of one method on one basis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isotune.adapter.operator import Adapter
from isotune.adapter.update import PlacedUpdate
from isotune.algebra.means import Nearest
from isotune.errors import IsotuneWarning
from isotune.methods.checks import require_choice
from isotune.methods.config import IsotuneConfig, type_of
from isotune.tuner.experts_layer import ExpertsLayer
from isotune.tuner.layer import Layer

MEANS = ("rotation", "orthomerge")
"""Names of the means: on the rotation group, and of the generators with OrthoMerge's corrected magnitude."""

_SAME_BASIS = 1e-5
_LARGE_ERROR = 0.01
"""Share of what a mean changes by which the adapter may differ from it without a warning."""
_ELSE = "To use them together, call base_model.set_adapter([...]), which composes them in that order."


@dataclass(frozen=True)
class Part:
    """What one adapter has on one layer."""

    operator: Adapter
    bases: tuple[Tensor, ...]
    """What is stored of its subspaces, with what is accumulated; none for a rotation of all inputs."""
    embedded: bool
    """Whether those are bases rather than pins."""
    moved: bool
    """Whether there is also an update accumulated on earlier subspaces."""


def check_request(
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    configs: Mapping[str, IsotuneConfig],
    combination_type: str,
) -> None:
    """Refuse names, weights, methods and kinds of a mean that cannot be combined.

    Raises:
        ValueError: they cannot; says which and why.
    """
    require_choice("combination_type", combination_type, MEANS)
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
    ranks = [getattr(configs[name], "base_rank_pattern", {}) for name in adapters]
    if any(own != ranks[0] for own in ranks):
        raise ValueError(f"{list(adapters)} truncate the base differently (base_rank_pattern), hence have no mean.")
    for name in adapters:
        config = configs[name]
        if config.modules_to_save or config.bias != "none":
            raise ValueError(
                f"{name!r} has modules_to_save={config.modules_to_save} and bias={config.bias!r}; only adapters with "
                "modules_to_save=None and bias='none' can be combined."
            )


def parts_of(layers: Mapping[str, Layer], adapters: Sequence[str]) -> dict[str, dict[str, Part]]:
    """Module -> adapter -> what it has there.

    Args:
        layers: the layers that hold any of the adapters, by name.
        adapters: names of one or more adapters.

    Raises:
        ValueError: an adapter is not on all of these layers, or a layer holds experts.
    """
    parts: dict[str, dict[str, Part]] = {}
    for name, layer in layers.items():
        absent = [adapter for adapter in adapters if adapter not in layer.isotune_operator]
        if absent:
            raise ValueError(f"{absent[0]!r} does not adapt {name!r}, which other adapters do. {_ELSE}")
        if isinstance(layer, ExpertsLayer):
            raise ValueError(f"Adapters on experts, such as {name!r}, cannot be averaged yet. {_ELSE}")
        parts[name] = {}
        for adapter in adapters:
            bases = layer.bases(adapter)
            parts[name][adapter] = Part(
                layer.adapter(adapter),
                tuple(layer.stored_of(adapter)),
                embedded=any(basis.embedded for basis in bases),
                moved=any(basis.accumulated is not None for basis in bases),
            )
    return parts


@dataclass(frozen=True)
class Mean:
    """The parameters of the weighted mean of adapters."""

    values: dict[str, dict[str, Tensor]]
    """Module -> parameter -> value, float64."""
    approximated: dict[str, Nearest]
    """Module -> how near the value is to the mean, where the method cannot express that exactly."""

    @property
    def error(self) -> float:
        """‖R − M‖_F / ‖R − I‖_F of the mean R and what stands for it, M, over all layers; 0 if it is exact."""
        norm = math.hypot(*(one.norm for one in self.approximated.values()))
        return math.hypot(*(one.missing for one in self.approximated.values())) / norm if norm else 0.0

    def warn(self) -> None:
        """Warn if the adapter that is made is far from the mean, which has no exact form."""
        if self.error > _LARGE_ERROR:
            shares = {name: one.missing / (one.norm or 1.0) for name, one in self.approximated.items()}
            worst = max(shares, key=lambda name: shares[name])
            warnings.warn(
                f"The mean has no exact form of this method and size: the nearest one differs from it by "
                f"{self.error:.1%} of all that it changes, most in {worst!r} by {shares[worst]:.1%}. PEFT can add the "
                "LoRA exports of the adapters exactly (add_weighted_adapter with combination_type='cat').",
                IsotuneWarning,
                stacklevel=3,
            )


def combine(parts: Mapping[str, Mapping[str, Part]], weights: Sequence[float], combination_type: str) -> Mean:
    """Compute the weighted mean of adapters.

    Rotations are averaged on the rotation group (`rotation_mean`), scales and gains geometrically, free matrices and
    angles linearly. Weights that sum to less than one leave the rest to the base model.

    Args:
        parts: module -> adapter -> what it has there, each module with the same adapters in the same order.
        weights: one weight per adapter.
        combination_type: one of MEANS; with "orthomerge" generators, free matrices and angles have their mean scaled
            to their mean magnitude in each layer.

    Raises:
        ValueError: the adapters differ in shapes, options, scale or basis, or their method has no mean; says what
            differs and where.
    """
    values: dict[str, dict[str, Tensor]] = {}
    approximated: dict[str, Nearest] = {}
    for name, own in parts.items():
        for adapter, part in own.items():
            if part.moved and abs(sum(weights) - 1.0) > _SAME_BASIS:
                raise ValueError(
                    f"The subspace of {adapter!r} in {name!r} has moved, and the mean keeps all of what is accumulated "
                    f"on earlier ones, so the weights must sum to 1, not {sum(weights):g}. {_ELSE}"
                )
            if (scale := part.operator.relative_scale) != 1.0:
                raise ValueError(
                    f"{adapter!r} has the scale {scale:g} in {name!r}, but only adapters as trained can be averaged; "
                    "set its scale to 1 first."
                )
        first, *others = own
        for other in others:
            difference = _difference(own[first], own[other])
            if difference:
                raise ValueError(f"{first!r} and {other!r} have {difference} in {name!r}, hence no mean. {_ELSE}")
        try:
            operators = [part.operator for part in own.values()]
            found = _mean(operators, torch.tensor(weights, dtype=torch.float64), combination_type)
        except ValueError as error:
            names = ", ".join(map(repr, own))
            raise ValueError(f"{names} cannot be combined in {name!r}: {error}. {_ELSE}") from None
        values[name] = {key: mean.value if isinstance(mean, Nearest) else mean for key, mean in found.items()}
        for mean in found.values():
            if isinstance(mean, Nearest):
                approximated[name] = mean
    return Mean(values, approximated)


def _difference(first: Part, other: Part) -> str | None:
    """How two adapters on a layer differ, apart from the values of their parameters; None if they do not."""
    one, two = first.operator, other.operator
    shapes = [{name: p.shape for name, p in operator.named_parameters()} for operator in (one, two)]
    if shapes[0] != shapes[1]:
        return f"different sizes ({_sizes(one, two)})"
    if one.batch_key() != two.batch_key():
        return "different options"
    if one.side != two.side:
        return f"different sides ({one.side} and {two.side})"
    if not (isinstance(one, PlacedUpdate) and isinstance(two, PlacedUpdate)):
        return None
    if one.placement_key != two.placement_key or first.embedded != other.embedded:
        return "different options (basis or the split of the singular values)"
    if one.scale != two.scale:
        return f"different scales ({one.scale:g} and {two.scale:g})"
    # With another seed the pins of one basis differ too.
    if [tensor.shape for tensor in first.bases] != [tensor.shape for tensor in other.bases]:
        return "different updates accumulated on earlier subspaces, as at least one has moved"
    if not all(_close(a, b) for a, b in zip(first.bases, other.bases, strict=True)):
        return "different bases of the principal subspace (solved on another machine or base, or moved)"
    return None


def _sizes(one: Adapter, two: Adapter) -> str:
    """The ranks of two adapters, or else the shapes of the parameters in which they differ."""
    if isinstance(one, PlacedUpdate) and isinstance(two, PlacedUpdate) and one.size != two.size:
        return f"r = {one.size} and r = {two.size}"
    shapes = [{name: tuple(p.shape) for name, p in operator.named_parameters()} for operator in (one, two)]
    odd = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    return ", ".join(" and ".join(str(own.get(name, "none")) for own in shapes) + f" of {name}" for name in odd)


def _close(one: Tensor, two: Tensor) -> bool:
    """Whether two bases are equal up to rounding, as from another number of threads; flipped signs are not."""
    return float(torch.linalg.vector_norm(one - two)) <= _SAME_BASIS * float(torch.linalg.vector_norm(one))


def _mean(operators: Sequence[Adapter], weights: Tensor, combination_type: str) -> dict[str, Tensor | Nearest]:
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
    corrected = combination_type == "orthomerge"
    return {
        name: means[name](torch.stack([values[name].detach() for values in by_name]), weights, corrected=corrected)
        for name in names
    }
