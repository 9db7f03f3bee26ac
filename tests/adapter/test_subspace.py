"""The subspace update on its own, against its definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import relative_error
from isotune.adapter.kernels import subspace_update
from isotune.adapter.operator import Below
from isotune.adapter.subspace import SubspaceAdapter, SubspaceBasis
from isotune.subspace.pinning import pin, pin_width

RANK, IN, OUT = 4, 11, 17


class Given(SubspaceAdapter):
    """An operator whose M − I is its parameter."""

    evaluated = ("change",)

    def __init__(self, change: Tensor) -> None:
        super().__init__(len(change))
        self.change = nn.Parameter(change)

    def batch_key(self) -> int:
        return self.size

    def difference_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters["change"]


def adapter_for(matrix: Tensor, *, power: float = 0.0, scale: float = 1.0) -> Given:
    """An adapter of random M − I on the principal subspace of a matrix."""
    adapter = Given(torch.randn(RANK, RANK, dtype=torch.promote_types(matrix.dtype, torch.float32)))
    adapter.configured_scale = adapter.scale = scale
    adapter.power = power
    _, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    basis = right[:RANK].to(torch.promote_types(matrix.dtype, torch.float32))
    adapter.placement = adapter.placed(basis, matrix, [pin(basis)], matrix)
    return adapter


def delta(adapter: Given) -> Tensor:
    """The change of W."""
    up, down = adapter.low_rank(torch.zeros(1, dtype=adapter.change.dtype))
    return up @ down


@pytest.fixture(params=[(OUT, IN), (IN, OUT)], ids=["tall", "wide"])
def matrix(request: Any) -> Tensor:
    return torch.randn(*request.param, dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_change_is_the_definition(matrix: Tensor, power: float, scale: float) -> None:
    adapter = adapter_for(matrix, power=power, scale=scale)
    difference = adapter.change.detach()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    left, values, right = left[:, :RANK], values[:RANK], right[:RANK]
    # Signs of singular vectors cancel only where they come in pairs, so they are brought to the adapter's own.
    up, down = adapter.low_rank(matrix)
    signs = torch.sign((right * down).sum(1))
    left, right, onward, back = left * signs, right * signs[:, None], values ** (1 - power), values**power
    expected = (left * onward) @ difference.T @ (right * back[:, None])
    torch.testing.assert_close(up @ down, scale * expected)
    torch.testing.assert_close(adapter.fold(matrix, adapter.tensors()) - matrix, scale * expected)
    assert (up.shape, down.shape) == ((matrix.shape[0], RANK), (RANK, matrix.shape[1]))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
def test_every_formula_is_the_same_function_with_the_same_gradients(
    matrix: Tensor, power: float, scale: float, bias: bool, needs_x: bool
) -> None:
    adapter = adapter_for(matrix, power=power, scale=scale)
    offset = torch.randn(matrix.shape[0], dtype=torch.float64) if bias else None
    start = torch.randn(3, 2, matrix.shape[1], dtype=torch.float64)
    cotangent = torch.randn(3, 2, matrix.shape[0], dtype=torch.float64)
    results = []
    for formula in ("merged", "fused", "output"):
        adapter.zero_grad()
        x = start.clone().requires_grad_(needs_x)
        if formula == "merged":
            y = nn.functional.linear(x, adapter.fold(matrix, adapter.tensors()), offset)
        elif formula == "fused":
            y = adapter.fused(x, adapter.tensors(), (matrix, offset))
        else:
            y = adapter.output(x, adapter.tensors(), Below(lambda x: nn.functional.linear(x, matrix, offset), offset))
        y.backward(cotangent)
        results.append((y, adapter.change.grad.clone(), x.grad))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            if expected is None:
                assert found is None
            else:
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_the_residual_gets_its_gradient(matrix: Tensor) -> None:
    factors = adapter_for(matrix).factors(torch.float64, matrix.device)
    residual = torch.randn(3, matrix.shape[0], dtype=torch.float64, requires_grad=True)
    difference = torch.randn(RANK, RANK, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, matrix.shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: subspace_update(*given, factors), (x, difference, residual))


def test_gradcheck_of_the_layer_with_its_update(matrix: Tensor) -> None:
    factors = adapter_for(matrix).factors(torch.float64, matrix.device)
    difference = torch.randn(RANK, RANK, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, matrix.shape[1], dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, difference: Tensor) -> Tensor:
        return subspace_update(x, difference, (matrix, None), factors)

    assert torch.autograd.gradcheck(layer, (x, difference))


@pytest.mark.parametrize("embedded", [True, False])
def test_what_is_stored_stays_single_precision(embedded: bool) -> None:
    basis = SubspaceBasis(RANK, IN, None if embedded else pin_width(RANK, IN), torch.device("cpu"))
    assert set(basis.state_dict()) == {"basis" if embedded else "pin"}
    assert basis.stored.shape == (RANK, IN if embedded else pin_width(RANK, IN))
    assert not list(basis.parameters())
    basis.record(torch.randn_like(basis.stored))
    before = basis.stored.clone()
    basis.to(torch.bfloat16)
    assert basis.stored.dtype == torch.float32
    assert torch.equal(basis.stored, before)


def test_a_placement_is_moved_and_cast_with_its_adapter(matrix: Tensor) -> None:
    adapter = adapter_for(matrix)
    before = adapter.placement
    adapter.to(torch.bfloat16)
    assert adapter.placement is not before
    assert adapter.placement is not None
    assert adapter.placement.down.dtype == adapter.placement.up.dtype == torch.bfloat16
    adapter.to("meta")
    assert adapter.placement is None  # no values, no placement


def test_the_scale_multiplies_what_is_trained_and_never_what_is_stored(matrix: Tensor) -> None:
    adapter = adapter_for(matrix, scale=0.5)
    placement, before = adapter.placement, delta(adapter).detach()
    adapter.set_scale(0.3)
    torch.testing.assert_close(delta(adapter), 0.3 * before)
    assert adapter.relative_scale == pytest.approx(0.3)
    adapter.set_scale(0.0)
    assert not delta(adapter).any()
    adapter.set_scale(1.0)
    assert torch.equal(delta(adapter), before)
    assert adapter.placement is placement


def test_an_adapter_without_a_placement_says_so() -> None:
    adapter = Given(torch.zeros(RANK, RANK))
    with pytest.raises(ValueError, match="not placed on its layer yet: call the whole model"):
        adapter.fused(torch.randn(2, IN), adapter.tensors(), (torch.randn(OUT, IN), None))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_zero_weight_gives_a_zero_update(power: float) -> None:
    change = delta(adapter_for(torch.zeros(OUT, IN), power=power))
    assert bool(torch.isfinite(change).all())
    assert not change.any()


def test_precision_of_a_tiny_update_in_bfloat16() -> None:
    matrix = torch.randn(64, 48)
    adapter = adapter_for(matrix)
    with torch.no_grad():
        adapter.change.mul_(1e-5)
    x = torch.randn(32, 48).bfloat16()
    expected = x.float() @ delta(adapter).T
    factors = adapter.factors(torch.bfloat16, matrix.device)
    found = subspace_update(x, adapter.difference(torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16), factors)
    assert relative_error(found, expected) < 4 * torch.finfo(torch.bfloat16).eps


def test_decoding_makes_what_acts_on_one_token_once(matrix: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the update is absorbed into a factor until a call ends, M − I is not prepared again for each token."""

    class Kernels:
        @staticmethod
        def can_multiply(*given: Any) -> bool:
            return True

        @staticmethod
        def linear_with_update(x: Tensor, weight: Tensor, bias: None, down: Tensor, up: Tensor) -> Tensor:
            return x @ weight.T + x @ down.T @ up.T

    adapter, prepared = adapter_for(matrix, scale=0.5), []
    more_up, more_down = torch.randn(len(matrix), 2).double(), torch.randn(2, matrix.shape[1]).double()
    basis = adapter.placement.down[:RANK]
    adapter.placement = adapter.placed(basis, matrix, [basis], matrix, (more_up, more_down))
    monkeypatch.setattr("isotune.adapter.kernels.kernels_for", lambda *_: Kernels)
    acting = adapter._acting
    adapter._acting = lambda *given, **options: (prepared.append(1), acting(*given, **options))[1]
    tensors, x = tuple(tensor.detach() for tensor in adapter.tensors()), torch.randn(1, matrix.shape[1]).double()
    adapter.given.tensors = tensors  # as within a call of generate
    expected = x @ (matrix + delta(adapter)).T
    prepared.clear()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(adapter.fused(x, tensors, (matrix, None)), expected)
    assert len(prepared) == 1
