"""nn.Linear and Conv1D as matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import EXACT_START, OPTIONS_FOR_12, OneLayer
from isotune import get_peft_model
from isotune.hosts import LinearHost, host_for
from isotune.methods import METHODS


def linear() -> nn.Module:
    return nn.Linear(5, 3)


def conv1d() -> nn.Module:
    return Conv1D(3, 5)


@pytest.mark.parametrize("build", [linear, conv1d])
def test_matrix_is_out_by_in_and_a_view(build: type) -> None:
    module = build()
    host = host_for(module, "x")
    assert isinstance(host, LinearHost)
    matrix = host.matrix()
    assert matrix.shape == (3, 5)
    assert (host.out_features, host.in_features) == (3, 5)
    assert matrix.data_ptr() == module.weight.data_ptr()
    assert not matrix.requires_grad
    x = torch.randn(4, 5)
    torch.testing.assert_close(module(x), x @ matrix.T + module.bias)
    assert torch.equal(host.stored(matrix), module.weight)


@pytest.mark.parametrize("build", [linear, conv1d])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_set_and_restore(build: type, requires_grad: bool) -> None:
    module = build().requires_grad_(requires_grad)
    host, original = host_for(module), module.weight
    kept = host.keep()
    values = original.detach().clone()
    other = torch.randn(3, 5, dtype=torch.float64)
    host.set_matrix(other)
    assert module.weight is not original
    assert torch.equal(original, values)  # whoever shares it keeps it
    assert torch.equal(host.matrix(), other.float())
    assert module.weight.requires_grad is requires_grad
    assert module.weight.is_contiguous()
    assert isinstance(module.weight, nn.Parameter)
    host.restore(kept)
    assert module.weight is original
    assert torch.equal(module.weight, values)


class Custom(nn.Linear):
    """A subclass with a plain weight, as libraries have."""


def test_subclasses_with_a_plain_weight_are_taken() -> None:
    assert host_for(Custom(4, 3)).matrix().shape == (3, 4)


class Doubling(nn.Linear):
    """A subclass that computes something else with its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_forward_of_a_subclass_is_called(method: str) -> None:
    base, x = OneLayer(Doubling(12, 12)), torch.randn(3, 12)
    expected = base(x)
    options = {**OPTIONS_FOR_12[method], **EXACT_START.get(method, {})}
    model = get_peft_model(base, METHODS[method](target_modules=["layer"], **options))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(3, 3, 1), nn.LayerNorm(3), nn.Bilinear(2, 2, 2), nn.Identity()])
def test_other_modules_are_refused_by_name_and_type(module: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=rf"'some\.name'.*{type(module).__name__}.*Supported: .*Linear.*exclude_modules"
    ):
        host_for(module, "some.name")


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 5, dtype=torch.int8), torch.zeros(15, dtype=torch.uint8), torch.zeros(3), torch.zeros(1, 3, 5)],
    ids=["int8", "packed", "vector", "three dimensions"],
)
def test_weights_that_are_no_floating_matrix_are_refused(weight: torch.Tensor) -> None:
    module = nn.Linear(5, 3)
    module.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"'some\.name'.*shape.*dtype"):
        host_for(module, "some.name")
