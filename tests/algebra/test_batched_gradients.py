"""Several gradients at once, as `torch.autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)` ask for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import OPTIONS_FOR_TINY, randomize
from isotune import get_peft_model
from isotune.methods import METHODS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_at_once_are_those_of_one_after_the_other(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    model = get_peft_model(net, METHODS[method](target_modules=["0", "2"], **OPTIONS_FOR_TINY.get(method, {})))
    randomize(model, "default", std=0.1)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    y = model(x).sum(0)
    directions = torch.eye(8, dtype=y.dtype)
    together = torch.autograd.grad(y, wanted, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        alone = torch.autograd.grad(y, wanted, direction, retain_graph=True)
        for one, all_ in zip(alone, together, strict=True):
            scale = max(float(one.abs().max()), 1e-12)
            assert float((all_[i] - one).abs().max()) <= (1e-5 if dtype == torch.float32 else 3e-2) * scale
