"""Ranks and block sizes for a model that is not changed: by energy of its weights or outputs, or for a budget."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from isotune.methods.config import IsotuneConfig
from isotune.methods.rotation import RotationConfig
from isotune.progress import bar
from isotune.tuner.batches import evaluating, groups_that_fit, on_device
from isotune.tuner.layer import Layer
from isotune.tuner.model import IsotuneModel
from isotune.tuner.sizes import ChosenSizes, choose_sizes

_MOMENTS_AT_ONCE = 2**31
"""Bytes of input moments that are gathered in one pass over the data; more layers take more passes."""


def choose_ranks(
    model: nn.Module, config: IsotuneConfig, *, data: Iterable[Mapping[str, Any]] | None = None
) -> ChosenSizes:
    """Choose a rank, or a block size, for each layer that a configuration adapts; the model is not changed.

    Args:
        model: the base model, with its weights.
        config: the method, its target modules, and rank_budget or rank_energy; `r="auto"` is 90 % of the energy.
        data: batches as the model takes them, whose padding an `attention_mask` says: the energy is then that of the
            layers' outputs on them. Without data it is that of the weights.

    Returns:
        A table, and in `options` what gives a configuration these sizes.

    Raises:
        ValueError: the configuration asks for no choice, no module matches, a weight has no values, the budget is too
            small, there is no batch, or data are given for a layer that is not linear or for a rotation of outputs.

    Examples:
        >>> from isotune import PsoftConfig
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> found = choose_ranks(model, PsoftConfig(target_modules=["0", "1"], rank_budget=100))
        >>> [(layer.module, layer.size, layer.parameters) for layer in found.layers]
        [('0', 9, 54), ('1', 8, 44)]
        >>> found.options
        {'r': 8, 'rank_pattern': {'0': 9}}
    """
    if not config.chooses_sizes:
        raise ValueError(
            "The configuration gives its sizes itself; ask for a choice by rank_budget, or by r='auto' and rank_energy."
        )
    if data is not None and isinstance(config, RotationConfig) and config.side == "output":
        raise ValueError(
            'Data are measured at the inputs of layers, and side="output" rotates their outputs, so the data would '
            'have no effect. Leave data out, or set side="input".'
        )
    with adapted_copy(model, config, placed=False) as (shadow, layers):
        if data is None:
            return choose_sizes(layers, config)
        return choose_sizes(layers, config, _moments(shadow, layers, list(data)))


@contextmanager
def adapted_copy(model: nn.Module, config: IsotuneConfig, *, placed: bool) -> Iterator[tuple[nn.Module, list[Layer]]]:
    """A copy of the model around the same tensors, and in it the layers that the configuration adapts.

    With `placed` it has the adapter as get_peft_model adds it, otherwise only layers in which nothing is chosen yet.

    Raises:
        ValueError: the model has adapters already.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has adapters already; give the base model, such as model.unload() returns.")
    tensors = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    shadow, asked = copy.deepcopy(model, dict(tensors)), copy.deepcopy(config)
    if not placed:
        setattr(asked, "origin", "")  # noqa: B010 (a ClassVar): as if a file's tensors came next, nothing is placed
        asked.sized = False
    try:
        IsotuneModel(shadow, {"default": asked}, "default")
        yield shadow, [module for module in shadow.modules() if isinstance(module, Layer)]
    finally:
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def _moments(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The sum of x xᵀ over the inputs of each layer, (in, in) in float32, by the layer's name; padding left out.

    Raises:
        ValueError: there is no batch, a layer is not linear, or it is not called for any of them.
    """
    if not batches:
        raise ValueError("The data hold no batch; give at least one, or leave data out.")
    if other := next((layer for layer in layers if layer.host.folds), None):
        raise ValueError(
            f"The inputs of {other.key!r}, a {type(other.host.module).__name__}, are not vectors that its weight "
            "multiplies, so data say nothing of its directions. Leave data out, or exclude the module with "
            "exclude_modules."
        )
    device = next(model.parameters()).device
    found: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def gather(key: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if mask[0] is not None and mask[0].shape == x.shape[:-1]:
            x = x[mask[0].bool()]
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        found[key] = rows.mT @ rows + found.get(key, 0.0)

    parts = list(groups_that_fit(layers, _MOMENTS_AT_ONCE, lambda layer: 4 * layer.in_features**2))
    shown = bar(total=len(parts) * len(batches), desc="activations", unit="batch")
    with torch.no_grad(), evaluating(model), shown:
        for part in parts:
            with ExitStack() as hooks:
                for layer in part:
                    hook = partial(gather, layer.key)
                    hooks.enter_context(layer.host.module.register_forward_pre_hook(hook))
                for batch in batches:
                    moved = on_device(batch, device)
                    mask[0] = moved.get("attention_mask")
                    model(**moved)
                    shown.update()
    if missed := next((layer.key for layer in layers if layer.key not in found), None):
        raise ValueError(
            f"The model does not call {missed!r} on the given data, so nothing is known of its inputs; exclude it with "
            "exclude_modules, or give data that use it."
        )
    return found
