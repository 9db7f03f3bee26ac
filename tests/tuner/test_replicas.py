"""Replicas as nn.DataParallel makes them, on which transformers trains on several GPUs without torchrun."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import (
    CHECKPOINTING,
    DROPOUT,
    EVERY_METHOD,
    FEW,
    HOSTS_OF_12,
    Chain,
    afresh,
    as_trained,
    move,
    relative_error,
    seeded_host,
    trainable,
)

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(method=FEW, host=("linear", "conv2d", "embedding")),
]


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[nn.Module]]:
    """torch's own replicate, whose broadcast, which knows GPUs only, is a copy for each replica."""
    module = import_module("torch.nn.parallel.replicate")

    def copies(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return lambda model, count, detach=False: module.replicate(model, range(count), detach)


def in_threads(calls: list[Callable[[], Tensor]]) -> list[Tensor]:
    """As DataParallel runs its replicas."""
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            found[index] = calls[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        if isinstance(result, Exception):
            raise result
    return [found[index] for index in range(len(calls))]


@pytest.mark.parametrize("host", HOSTS_OF_12)
def test_replicas_give_the_models_output_and_gradients(method: str, host: str, replicate: Any) -> None:
    model = as_trained(method, seeded_host(host), "layer").train()
    parts = [HOSTS_OF_12[host][1]() for _ in range(3)]
    expected = model(torch.cat(parts))
    expected.sin().sum().backward()
    right = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    replicas = replicate(model, 3)
    outputs = in_threads([lambda m=m, x=x: m(x) for m, x in zip(replicas, parts, strict=True)])
    assert relative_error(torch.cat(outputs).detach(), expected.detach()) < 1e-5
    sum(y.sin().sum() for y in outputs).backward()
    for name, parameter in trainable(model).items():
        assert relative_error(parameter.grad, right[name]) < 1e-4, name


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("dropping", [False, True])
def test_training_on_replicas(method: str, mode: str | None, dropping: bool, replicate: Any) -> None:
    """Steps of the model between new replicas, evaluation by the model itself among them."""
    base = Chain(checkpointing=mode)
    model = as_trained(method, base, **(DROPOUT.get(method, {}) if dropping else {})).train()
    twin = afresh(model)
    x = torch.randn(6, 12)
    for _ in range(3):
        replicas = replicate(model, 2)
        outputs = [m(part.requires_grad_()) for m, part in zip(replicas, x.clone().chunk(2), strict=True)]
        loss = sum(y.sin().sum() for y in outputs)
        loss.backward()
        if not dropping:
            twin(x).sin().sum().backward()
            for one, other in zip(trainable(model).values(), trainable(twin).values(), strict=True):
                assert relative_error(one.grad, other.grad) < 1e-4
        for each in (model, twin):
            with torch.no_grad():
                for parameter in trainable(each).values():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
                        parameter.grad = None
        with torch.no_grad():
            model.eval()
            assert relative_error(model(x), afresh(model)(x)) < 1e-5
            model.train()


def test_a_replica_outlives_a_change_of_its_model(method: str, replicate: Any) -> None:
    model, x = as_trained(method), torch.randn(4, 12)
    expected = model(x).detach()
    (replica,) = replicate(model, 1, True)
    move(model, seed=8)
    with torch.no_grad():
        assert relative_error(replica(x), expected) < 1e-5
        assert relative_error(model(x), expected) > 1e-3
        assert relative_error(model(x), afresh(model)(x)) < 1e-5
