"""Losses that keep qGOFT's pairs of columns and HRA's directions nearly orthogonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.internals.deepspeed_state import takes_gradients
from isotune.tuner.layer import Layer


def _penalties(model: nn.Module) -> list[Tensor]:
    """The weighted penalty of every active adapter that has one, layer by layer."""
    found = []
    for module in model.modules():
        if isinstance(module, Layer) and not module.disable_adapters:
            active = [name for name in module.active_adapters if name in module.isotune_operator]
            penalties = (module.adapter(name).penalty() for name in active)
            found += [penalty for penalty in penalties if penalty is not None]
    return found


def has_regularization(model: nn.Module) -> bool:
    """Whether an active adapter of the model has a regulariser with a weight above 0."""
    return bool(_penalties(model))


def regularization_loss(model: nn.Module) -> Tensor:
    """The sum of the regularisers of all active adapters, weighted by their `regularizer_weight`.

    Add it to the loss once per optimiser step: `loss = loss + isotune.regularization_loss(model)`.

    Returns:
        A differentiable scalar on the adapters' device; 0 if no active adapter has a regulariser.

    Raises:
        ValueError: DeepSpeed ZeRO-3 has partitioned the parameters of an adapter with a regulariser.

    Examples:
        >>> from isotune import HRAConfig, get_peft_model
        >>> config = HRAConfig(r=2, regularizer_weight=0.1, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        >>> loss = model(torch.ones(1, 8)).sum() + regularization_loss(model)

    Source: Ma et al., GOFT (ICML 2024), for qGOFT; Yuan et al., HRA (NeurIPS 2024), equation 7.
    """
    penalties = _penalties(model)
    if not penalties:
        return torch.zeros(())
    return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()


def regularization_callback() -> Any:
    """Make a callback for transformers' and TRL's trainers that trains with `regularization_loss`.

    It adds the regularisers' gradient right before each optimiser step, after the Trainer has averaged over gradient
    accumulation and clipped; the logged loss is that of the task alone.
    """
    from transformers import TrainerCallback

    class RegularizationCallback(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            add_regularization_gradient(kwargs["model"])

    return RegularizationCallback()


def add_regularization_gradient(model: nn.Module) -> None:
    """Add the gradient of `regularization_loss` to `.grad`, after the last backward pass before a step.

    Raises:
        ValueError: the model is trained by DeepSpeed ZeRO, which has taken the gradients away by then.
    """
    with torch.enable_grad():
        loss = regularization_loss(model)
    if not loss.requires_grad:
        return
    if takes_gradients(model):
        raise ValueError(
            "DeepSpeed has taken the gradients away before this callback could add to them. Add "
            "isotune.regularization_loss(model) to the loss instead, or set regularizer_weight=0."
        )
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and ".isotune_operator." in name]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
