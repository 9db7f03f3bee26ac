"""The gradient that a subspace is chosen from is that of the weight, whatever the model does around its layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers import HOSTS_OF_12, MOVING, configured, only, trainable
from isotune import get_peft_model
from isotune.moving import MovingSchedule
from isotune.moving.choosing import _Copies


def activated(layer: nn.Module, x: Tensor, plain: bool) -> Tensor:
    return nn.functional.relu(layer(x), inplace=not plain)


def residual(layer: nn.Module, x: Tensor, plain: bool) -> Tensor:
    x = x.clone()
    y = 3 * torch.tanh(layer(x)[..., :12])
    return x + y if plain else x.add_(y)


def twice(layer: nn.Module, x: Tensor, plain: bool) -> Tensor:
    """The second call has the very tensor of the first, with other values."""
    x = x.clone()
    y = torch.tanh(layer(x))
    x = 0.5 * x if plain else x.mul_(0.5)
    return y + activated(layer, x, plain)


def named(layer: nn.Module, x: Tensor, plain: bool) -> Tensor:
    return torch.tanh(layer(x) if plain else layer(x=x))


class Block(nn.Module):
    """One layer in a model that works in place, or with `plain` does not."""

    def __init__(self, way: Callable[[nn.Module, Tensor, bool], Tensor], host: str) -> None:
        super().__init__()
        self.way, self.plain, self.layer = way, False, HOSTS_OF_12[host][0]()

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.layer, x, self.plain)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y - torch.linspace(-1, 1, y.numel()).view(y.shape)).square().mean()


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("host", ["linear", "transposed"])
@pytest.mark.parametrize("way", [activated, residual, twice, named])
def test_the_gradient_is_exact_where_a_model_works_in_place(
    way: Callable[[nn.Module, Tensor, bool], Tensor], host: str, method: str
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Block(way, host), configured(method, ["layer"]))
    x = torch.randn(4, 7, 12)
    twin = copy.deepcopy(model).merge_and_unload().requires_grad_()
    twin.plain = True
    loss(twin, x).backward()
    layer = only(model)
    full = layer.host.seen(twin.layer.weight.grad)
    schedule = MovingSchedule(1, select="gradient", batches=[x], loss=loss)
    schedule.step(model, torch.optim.AdamW(trainable(model).values()))
    basis = layer.bases("default")[0].basis
    expected = torch.linalg.svd(full.double()).Vh[: len(basis)].float()
    torch.testing.assert_close(torch.linalg.svdvals(basis @ expected.T), torch.ones(len(basis)), rtol=0, atol=1e-4)


def test_layers_that_are_given_the_same_tensor_share_its_copy() -> None:
    copies, x = _Copies(), torch.randn(3, 2)
    first = copies(x)
    assert copies(x) is first
    assert first.data_ptr() != x.data_ptr()
    before = x.clone()
    x.zero_()
    assert torch.equal(first, before)
    assert torch.equal(copies(x), x)
