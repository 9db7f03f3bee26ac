"""Half precision, loss scaling, checkpointing, accumulation and copies, for every method."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from helpers import (
    OPTIONS_FOR_12,
    OPTIONS_FOR_TINY,
    assert_same_gradients,
    gradients,
    one_by_one,
    randomize,
    relative_error,
    some_tokens,
    tiny_llama,
    trainable,
)
from isotune import get_peft_model
from isotune.methods import METHODS

pytestmark = pytest.mark.parametrize("method", METHODS)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def stack(method: str) -> Any:
    base = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 12))
    model = get_peft_model(base, METHODS[method](target_modules=["0", "2", "4"], **OPTIONS_FOR_12[method])).train()
    randomize(model)
    return model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
SELECTIVE = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)}


@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"use_reentrant": False}, SELECTIVE])
def test_checkpointing_changes_no_gradient(method: str, how: dict[str, Any]) -> None:
    config = METHODS[method](target_modules=["q_proj", "v_proj", "down_proj"], **OPTIONS_FOR_TINY[method])
    plain = get_peft_model(tiny_llama(), config).train()
    randomize(plain)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.enable_input_require_grads()
    tokens = some_tokens()
    for each in (model, plain):
        each(input_ids=tokens, labels=tokens).loss.backward()
    assert_same_gradients(model, plain, 1e-6)


@HALF
def test_autocast_trains_the_parameters_in_single(method: str, dtype: torch.dtype) -> None:
    model = stack(method)
    wide, x = copy.deepcopy(model), torch.randn(6, 12)
    with torch.autocast("cpu", dtype=dtype):
        output = model(x)
    assert output.dtype == dtype
    assert relative_error(output, wide(x)) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    output.float().square().mean().backward()
    loss_of(wide, x).backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(model).values())
    assert_same_gradients(model, wide, 0.1 if dtype == torch.bfloat16 else 1e-2)


class InSingle(nn.Linear):
    """A layer that computes in single precision whatever the setting, as some libraries' do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@HALF
def test_autocast_over_a_layer_that_returns_single_precision(method: str, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(12, 24), InSingle(24, 12))
    model = get_peft_model(base, METHODS[method](target_modules=["1"], **OPTIONS_FOR_12[method])).train()
    randomize(model)
    wide, x = copy.deepcopy(model), torch.randn(6, 12)
    with torch.autocast("cpu", dtype=dtype):
        output = model(x)
    assert output.dtype == torch.float32
    assert relative_error(output, wide(x)) < 2e-2
    output.square().mean().backward()
    loss_of(wide, x).backward()
    assert_same_gradients(model, wide, 0.1 if dtype == torch.bfloat16 else 2e-2)


def test_a_scaled_loss_gives_the_steps_of_an_unscaled_one(method: str) -> None:
    """And a step whose gradients overflow is not made."""
    model, x = stack(method), torch.randn(6, 12)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for each, scaled in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(trainable(each).values(), lr=0.05)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(each, x)
            if scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
    for found, expected in zip(trainable(model).values(), trainable(twin).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    before = [p.detach().clone() for p in trainable(model).values()]
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.05)
    scaler.scale(loss_of(model, x) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(map(torch.equal, before, trainable(model).values()))


def test_accumulated_gradients_are_those_of_the_whole_batch(method: str) -> None:
    model, x = stack(method), torch.randn(8, 12)
    twin = copy.deepcopy(model)
    for part in x.chunk(4):
        (loss_of(model, part) / 4).backward()
    loss_of(twin, x).backward()
    assert_same_gradients(model, twin, 1e-5)


def test_functional_call(method: str) -> None:
    model, x = stack(method), torch.randn(6, 12)
    moved = {name: (p + 0.05 * torch.randn_like(p)).detach().requires_grad_() for name, p in trainable(model).items()}
    output = torch.func.functional_call(model, moved, (x,))
    reference = one_by_one(model)
    reference.load_state_dict({name: value.detach() for name, value in moved.items()}, strict=False)
    torch.testing.assert_close(output, reference(x), rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    reference(x).square().sum().backward()
    for name, expected in gradients(reference).items():
        torch.testing.assert_close(moved[name].grad, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in trainable(model).values())


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved])
def test_a_copy_is_the_same_and_independent(method: str, duplicate: Callable[[Any], Any]) -> None:
    model, x = stack(method), torch.randn(6, 12)
    model(x).sum().backward()
    model.zero_grad()
    twin = duplicate(model)
    expected = model(x).detach()
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    randomize(twin, std=0.5)
    assert torch.equal(model(x), expected)
    assert relative_error(twin(x).detach(), expected) > 1e-3
