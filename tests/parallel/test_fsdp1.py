"""FullyShardedDataParallel, accelerate's default, on every kind of host: in one process it does all but talk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from helpers import EVERY_METHOD, FEW, HOSTS_OF_12, LORA, Chain, as_trained, relative_error, seeded_host, trainable
from isotune.tuner.layer import Layer

pytestmark = [
    pytest.mark.parametrize("method", [*EVERY_METHOD, LORA]),
    pytest.mark.covered(method=FEW, host=("linear", "conv2d", "embedding")),
]


@pytest.fixture(autouse=True, scope="module")
def _group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module, *, by_layer: bool) -> nn.Module:
    """The model under FSDP1, whole or each adapted layer by itself as well."""
    policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, Layer)) if by_layer else None
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy)


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_outputs_and_gradients_are_those_of_the_model(method: str, host: str, by_layer: bool, used: bool) -> None:
    if method == LORA and host not in ("linear", "conv2d", "embedding"):
        pytest.skip("needs other options")
    model, x = as_trained(method, seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    twin = copy.deepcopy(model)
    if used:
        model(x)
    spread = sharded(model, by_layer=by_layer)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert relative_error(spread(x).detach(), twin(x).detach()) < 1e-5
    for _ in range(2):
        for each in (spread, twin):
            each.zero_grad()
            each(x).sin().sum().backward()
        for one, other in zip(trainable(spread).values(), trainable(twin).values(), strict=True):
            assert relative_error(one.grad, other.grad) < 1e-4
        for each in (spread, twin):
            torch.optim.SGD(trainable(each).values(), lr=1e-3).step()


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_model_of_several_layers_trains_alike(method: str, by_layer: bool) -> None:
    model = as_trained(method, Chain()).train()
    twin, x = copy.deepcopy(model), torch.randn(6, 12)
    spread = sharded(model, by_layer=by_layer)
    optimizers = [torch.optim.AdamW(trainable(each).values(), lr=1e-2) for each in (spread, twin)]
    for _ in range(3):
        losses = []
        for each, optimizer in zip((spread, twin), optimizers, strict=True):
            loss = each(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with torch.no_grad():
        assert relative_error(spread.eval()(x), twin.eval()(x)) < 1e-4
