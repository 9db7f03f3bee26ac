"""What truncating the base's weights does to a model's outputs, before any training and without changing the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isotune.errors import IsotuneWarning
from isotune.methods.config import IsotuneConfig
from isotune.progress import bar
from isotune.tools.ranks import adapted_copy
from isotune.tuner.batches import evaluating, on_device
from isotune.tuner.truncating import TruncatedLayer, summary

_OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "image_embeds", "sample")
"""What a model's output calls its result, in this order, if it is not a tensor."""


@dataclass(frozen=True)
class TruncationError:
    """What an untrained adapter with `truncate_base` does to a model."""

    layers: tuple[TruncatedLayer, ...]
    """Every adapted layer."""
    error: float
    """‖y' − y‖ / ‖y‖ over the outputs y of all batches; 0 if nothing changes."""
    worst: float
    """The largest such error of one batch."""

    @property
    def before(self) -> int:
        """Numbers in the weights of the adapted layers."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Numbers in them once they are truncated."""
        return sum(layer.after for layer in self.layers)

    def __str__(self) -> str:
        return f"{summary(self.layers)}; outputs change by {self.error:.1%}, at most {self.worst:.1%} in a batch"


@torch.no_grad()
def truncation_error(model: nn.Module, config: IsotuneConfig, data: Iterable[Any]) -> TruncationError:
    """Measure how far an untrained adapter with `truncate_base` moves a model's outputs; the model is not changed.

    Both models run in evaluation mode. Beside the model its truncated weights are in memory.

    Args:
        model: the base model, without adapters.
        config: the configuration, with truncate_base=True.
        data: batches: mappings of the model's arguments, or a tensor that is its only one. Positions that an
            `attention_mask` leaves out do not count.

    Returns:
        The error of the outputs (logits, or the last hidden state), and what was done to each layer.

    Raises:
        ValueError: the configuration does not truncate weights, it cannot be used on this model, there is no batch,
            or the model gives no tensor that is known as its result.

    Examples:
        >>> from isotune import CersaConfig
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> model = nn.Sequential(nn.Linear(32, 32))
        >>> config = CersaConfig(truncate_base=True, base_energy=0.5, target_modules=["0"])
        >>> found = truncation_error(model, config, [torch.randn(8, 32)])
        >>> found.layers[0].rank, found.after, round(found.layers[0].energy, 2), found.error > 0.1
        (7, 455, 0.55, True)
    """
    if not getattr(config, "truncate_base", False):
        raise ValueError("The configuration truncates no weight: set truncate_base=True (CERSA).")
    batches = list(data)
    if not batches:
        raise ValueError("The data hold no batch; give at least one.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IsotuneWarning)  # that the base has changed: this copy goes
        with adapted_copy(model, config, placed=True) as (truncated, layers):
            errors, norms = _compared(model, truncated, batches)
            found = tuple(TruncatedLayer.of(layer) for layer in layers)
    shares = [_share(*one) for one in zip(errors, norms, strict=True)]
    return TruncationError(found, _share(math.hypot(*errors), math.hypot(*norms)), max(shares))


def _compared(model: nn.Module, truncated: nn.Module, batches: list[Any]) -> tuple[list[float], list[float]]:
    """‖y' − y‖ and ‖y‖ of each batch."""
    device, errors, norms = next(model.parameters()).device, [], []
    with evaluating(model), evaluating(truncated):
        for batch in bar(batches, desc="outputs", unit="batch"):
            moved = on_device(batch, device)
            before, after = (_result(one, moved) for one in (model, truncated))
            norms.append(float(torch.linalg.vector_norm(before)))
            errors.append(float(torch.linalg.vector_norm(after - before)))
    return errors, norms


def _result(model: nn.Module, batch: Any) -> Tensor:
    """A model's result for a batch, in at least float32, without the positions that the batch leaves out."""
    given = model(**batch) if isinstance(batch, Mapping) else model(batch)
    named = (getattr(given, name, None) for name in _OUTPUTS)
    found = given if isinstance(given, Tensor) else next((one for one in named if isinstance(one, Tensor)), None)
    if found is None:
        raise ValueError(
            f"The output of the model, a {type(given).__name__}, is no tensor and has none of {', '.join(_OUTPUTS)}."
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == found.shape[:2]:
        found = found[mask.bool()]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _share(error: float, norm: float) -> float:
    return error / norm if norm else float(error > 0.0)
