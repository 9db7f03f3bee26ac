"""The subspace update on its own, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import relative_error
from isotune.adapter.subspace import SubspaceUpdate
from isotune.subspace.pinning import pin_width

RANK, IN, OUT = 4, 11, 17


def form_for(matrix: Tensor, *, power: float = 0.0, scale: float = 1.0, embedded: bool = False) -> SubspaceUpdate:
    width = None if embedded else pin_width(RANK, matrix.shape[1])
    form = SubspaceUpdate(RANK, matrix.shape[1], reader_power=power, pin_width=width, device=torch.device("cpu"))
    _, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    form.adopt(right[: RANK + 2].to(torch.promote_types(matrix.dtype, torch.float32)), matrix, scale, 0)
    return form


@pytest.fixture(params=[(OUT, IN), (IN, OUT)], ids=["tall", "wide"])
def matrix(request: Any) -> Tensor:
    return torch.randn(*request.param, dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_delta_is_the_definition(matrix: Tensor, power: float, scale: float) -> None:
    form = form_for(matrix, power=power, scale=scale)
    difference = torch.randn(RANK, RANK, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    left, values, right = left[:, :RANK], values[:RANK], right[:RANK]
    # Signs of singular vectors cancel only where they come in pairs, so they are brought to the form's own.
    signs = torch.sign((right * form.reader).sum(1))
    left, right, onward, back = left * signs, right * signs[:, None], values ** (1 - power), values**power
    expected = (left * onward) @ difference.T @ (right * back[:, None])
    torch.testing.assert_close(form.delta(difference), scale * expected)
    up, down = form.factors(difference)
    assert (up.shape, down.shape) == ((matrix.shape[0], RANK), (RANK, matrix.shape[1]))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
def test_every_formula_is_the_same_function_with_the_same_gradients(
    matrix: Tensor, power: float, scale: float, bias: bool, needs_x: bool
) -> None:
    form = form_for(matrix, power=power, scale=scale)
    offset = torch.randn(matrix.shape[0], dtype=torch.float64) if bias else None
    start = torch.randn(3, 2, matrix.shape[1], dtype=torch.float64)
    change = torch.randn(RANK, RANK, dtype=torch.float64)
    cotangent = torch.randn(3, 2, matrix.shape[0], dtype=torch.float64)
    results = []
    for formula in ("merged", "linear", "update"):
        x, difference = start.clone().requires_grad_(needs_x), change.clone().requires_grad_()
        if formula == "merged":
            weight = matrix + form.writer @ difference.T @ form.reader
            y = nn.functional.linear(x, weight, offset)
        elif formula == "linear":
            y = form.linear(x, difference, matrix, offset)
        else:
            y = form.update(x, difference, nn.functional.linear(x, matrix, offset))
        y.backward(cotangent)
        results.append((y, difference.grad, x.grad))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            if expected is None:
                assert found is None
            else:
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_the_residual_gets_its_gradient(matrix: Tensor) -> None:
    form = form_for(matrix)
    residual = torch.randn(3, matrix.shape[0], dtype=torch.float64, requires_grad=True)
    difference = torch.randn(RANK, RANK, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, matrix.shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(form.update, (x, difference, residual))


def test_linear_gradcheck(matrix: Tensor) -> None:
    form = form_for(matrix)
    difference = torch.randn(RANK, RANK, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, matrix.shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, d: form.linear(a, d, matrix, None), (x, difference))


@pytest.mark.parametrize("embedded", [True, False])
def test_what_is_stored(matrix: Tensor, embedded: bool) -> None:
    form = form_for(matrix, embedded=embedded)
    assert set(form.state_dict()) == {"basis" if embedded else "pin"}
    stored = form.stored
    assert stored.dtype == torch.float32
    width = matrix.shape[1] if embedded else pin_width(RANK, matrix.shape[1])
    assert stored.shape == (RANK, width)
    assert not [name for name, p in form.named_parameters()]
    before = stored.clone()
    form.to(torch.bfloat16)
    assert form.reader.dtype == form.writer.dtype == torch.bfloat16
    assert form.stored.dtype == torch.float32
    assert torch.equal(form.stored, before)


def test_rescale(matrix: Tensor) -> None:
    form = form_for(matrix)
    difference = torch.randn(RANK, RANK, dtype=torch.float64)
    before = form.delta(difference)
    form.rescale(0.3)
    torch.testing.assert_close(form.delta(difference), 0.3 * before)
    form.rescale(1.0)
    torch.testing.assert_close(form.delta(difference), before)
    with pytest.raises(ValueError, match="disable_adapter"):
        form.rescale(0.0)


def test_a_written_pin_is_noticed(matrix: Tensor) -> None:
    form = form_for(matrix)
    assert form.settled
    assert not form.holds_foreign_basis()
    same = form.stored.clone()
    form.stored.copy_(same)  # equal values: nothing to do
    assert not form.needs_placing()
    form.stored.copy_(same + 0.1)
    assert not form.settled
    assert form.needs_placing()
    assert form.holds_foreign_basis()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_zero_weight_gives_a_zero_update(power: float) -> None:
    form = form_for(torch.zeros(OUT, IN), power=power)
    delta = form.delta(torch.randn(RANK, RANK))
    assert bool(torch.isfinite(delta).all())
    assert not delta.any()


def test_precision_of_a_tiny_update_in_bfloat16() -> None:
    matrix = torch.randn(64, 48)
    form = form_for(matrix)
    difference = 1e-5 * torch.randn(RANK, RANK)
    x = torch.randn(32, 48).bfloat16()
    expected = x.float() @ form.delta(difference).T
    form.to(torch.bfloat16)
    found = form.update(x, difference.bfloat16(), torch.zeros(32, 64, dtype=torch.bfloat16))
    assert relative_error(found, expected) < 4 * torch.finfo(torch.bfloat16).eps
