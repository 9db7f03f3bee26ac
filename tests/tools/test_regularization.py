"""The regularisers of qGOFT and HRA as a loss, as a Trainer callback, and in a recipe's loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import layers_of, randomize, tiny_llama, trainable
from isotune import (
    GOFTConfig,
    HRAConfig,
    QGOFTConfig,
    get_peft_model,
    regularization_callback,
    regularization_loss,
)
from isotune.methods.rotation import RotationConfig
from isotune.tools.regularization import add_regularization_gradient, has_regularization

TARGETS = ["q_proj", "v_proj"]


def adapted(config: RotationConfig) -> torch.nn.Module:
    config.target_modules = TARGETS
    model = get_peft_model(tiny_llama(), config)
    randomize(model)
    return model


def by_hand(model: torch.nn.Module, weight: float) -> torch.Tensor:
    total = torch.zeros(())
    for layer in layers_of(model):
        operator = layer.adapter("default")
        if hasattr(operator, "pairs"):
            for (a1, b1), (a2, b2) in operator.pairs + torch.eye(2):
                total = total + (a1 * b1 + a2 * b2) ** 2
        else:
            units = torch.nn.functional.normalize(operator.vectors, dim=1)
            total = total + (units @ units.T - torch.eye(len(units))).square().sum()
    return weight * total


@pytest.mark.parametrize("config", [QGOFTConfig(regularizer_weight=0.3), HRAConfig(r=4, regularizer_weight=0.3)])
def test_the_loss_is_the_formula_over_all_layers(config: RotationConfig) -> None:
    model = adapted(config)
    loss, expected = regularization_loss(model), by_hand(model, 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert loss > 0
    parameters = list(trainable(model).values())
    for found, right in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)


def test_only_active_enabled_adapters_with_a_weight_count() -> None:
    model = adapted(QGOFTConfig(regularizer_weight=0.1))
    alone = float(regularization_loss(model))
    model.add_adapter("free", QGOFTConfig(regularizer_weight=0.0, target_modules=TARGETS))
    assert float(regularization_loss(model)) == alone
    model.set_adapter("free")
    assert not has_regularization(model)
    assert float(regularization_loss(model)) == 0.0
    model.set_adapter("default")
    assert has_regularization(model)
    with model.disable_adapter():
        assert not has_regularization(model)
    assert not has_regularization(adapted(GOFTConfig()))


def test_the_gradient_is_added_to_what_is_there() -> None:
    model = adapted(HRAConfig(r=4, regularizer_weight=0.5))
    parameters = list(trainable(model).values())
    wanted = torch.autograd.grad(regularization_loss(model), parameters)
    parameters[0].grad = torch.ones_like(parameters[0])
    with torch.no_grad():  # as a Trainer's callbacks are called
        add_regularization_gradient(model)
    torch.testing.assert_close(parameters[0].grad, 1 + wanted[0])
    torch.testing.assert_close(parameters[1].grad, wanted[1])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_callback_trains_with_it(accumulation: int, tmp_path: Path) -> None:
    """One step of SGD from no task loss at all is a step along the regulariser's gradient, whatever is accumulated."""
    model = adapted(QGOFTConfig(regularizer_weight=2.0))

    class NoTask(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], **_: object) -> torch.Tensor:
            return 0.0 * model(**inputs).logits.sum()

    rows = [{"input_ids": torch.arange(4, 9)} for _ in range(2 * accumulation)]
    before = float(regularization_loss(model))
    parameters = list(trainable(model).values())
    step = torch.autograd.grad(regularization_loss(model), parameters)
    expected = [p.detach() - 0.01 * g for p, g in zip(parameters, step, strict=True)]
    NoTask(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        callbacks=[regularization_callback()],
    ).train()
    for parameter, right in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), right, rtol=1e-4, atol=1e-6)
    assert float(regularization_loss(model)) < before
