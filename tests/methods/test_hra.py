"""HRA: reflections by the definition, pairs at the start, the penalty, the strict form, and the exact low rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import adapt, layers_of, randomize, relative_error, trainable
from isotune import get_peft_model
from isotune.methods import BOFTConfig, GOFTConfig, HRAConfig, OFTConfig
from isotune.methods.hra import HRAOperator
from rotation_checks import (
    assert_is,
    assert_orthogonal,
    assert_penalty_is,
    bare,
    fill,
    fillings,
    maps_of,
    orthogonality_error,
)

# -- the operator --------------------------------------------------------------------------------------------------


def reflected(vectors: Tensor) -> Tensor:
    """H_r ⋯ H₂ H₁, so that W Mᵀ = W H₁ H₂ ⋯ H_r."""
    eye = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    product = eye
    for vector in vectors:
        unit = vector / vector.square().sum().sqrt()
        product = (eye - 2 * torch.outer(unit, unit)) @ product
    return product


def strictly_reflected(vectors: Tensor) -> Tensor:
    """I − 2 U Uᵀ with U from the Gram-Schmidt process, one direction after the other."""
    units: list[Tensor] = []
    for vector in vectors:
        rest = vector
        for unit in units:
            rest = rest - unit * unit.dot(rest)
        units.append(rest / rest.square().sum().sqrt())
    basis = torch.stack(units)
    return torch.eye(vectors.shape[1], dtype=vectors.dtype) - 2 * basis.T @ basis


SHAPES = [(6, 2), (9, 4), (5, 8), (16, 8), (2, 2)]


@pytest.mark.parametrize(("n", "count"), SHAPES)
def test_operator_is_the_definition(n: int, count: int) -> None:
    operator = HRAOperator(n, count).double()
    assert operator.is_identity()
    torch.testing.assert_close(operator.matrix(), torch.eye(n).double(), rtol=0, atol=1e-14)
    assert_is(operator, lambda: reflected(operator.vectors))  # the gradient of the equal pairs, too
    fill(operator, "uniform", 2.0, seed=1)
    assert not operator.is_identity()
    assert_is(operator, lambda: reflected(operator.vectors))


@pytest.mark.parametrize(("n", "count"), [(6, 2), (9, 4), (16, 7), (5, 1), (7, 6)])
def test_the_strict_operator_is_the_definition(n: int, count: int) -> None:
    operator = HRAOperator(n, count, strict=True).double()
    assert not operator.is_identity()
    fill(operator, "uniform", 2.0, seed=1)
    assert_is(operator, lambda: strictly_reflected(operator.vectors))


@given(filling=fillings(), n=st.integers(2, 60), pairs=st.integers(1, 10))
def test_exactly_orthogonal(filling: tuple[str, float, int], n: int, pairs: int) -> None:
    """With zero directions and with parallel ones."""
    operator = HRAOperator(n, 2 * pairs)
    fill(operator, *filling)
    assert_orthogonal(operator)


@given(filling=fillings(), n=st.integers(2, 60), data=st.data())
def test_the_strict_form_is_exactly_orthogonal(filling: tuple[str, float, int], n: int, data: st.DataObject) -> None:
    operator = HRAOperator(n, data.draw(st.integers(1, n)), strict=True)
    fill(operator, *filling)
    assert_orthogonal(operator)


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1e3, 1e30])
def test_the_length_of_a_direction_does_not_matter(length: float) -> None:
    operator = HRAOperator(12, 4)
    fill(operator, "uniform", 1.0, seed=0)
    before = operator.matrix().detach()
    with torch.no_grad():
        operator.vectors.mul_(length)
    torch.testing.assert_close(operator.matrix(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_at_the_start(dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(40, 24, dtype=dtype), nn.Tanh(), nn.Linear(24, 8, dtype=dtype))
    x = torch.randn(16, 40, dtype=dtype)
    expected = base(x).detach()
    model = get_peft_model(base, HRAConfig(r=8, target_modules=["0", "2"]))
    assert relative_error(model(x), expected) < (1e-6 if dtype == torch.float32 else 1e-14)
    for layer in layers_of(model):
        vectors = layer.adapter("default").vectors
        assert torch.equal(vectors[0::2], vectors[1::2])
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(8, dtype=vectors.dtype))
        assert torch.linalg.matrix_rank(vectors.detach()) == 4  # the pairs are not all the same
    loss = (model(x) * torch.randn(16, 8, dtype=dtype)).sum()
    assert all(bool(g.any()) for g in torch.autograd.grad(loss, list(trainable(model).values())))


# -- r -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "names"), [(1, "2"), (3, "2 or 4"), (7, "6 or 8"), (33, "32 or 34")])
def test_odd_r_is_refused(r: int, names: str) -> None:
    with pytest.raises(ValueError, match=rf"r={r} is not allowed: .*Choose r={names}\.$"):
        HRAConfig(r=r)
    HRAConfig(r=r, apply_GS=True, init_weights=False)  # the strict form has no pairs


def test_more_reflections_than_inputs() -> None:
    """Directions need not be independent, unless they are to be orthonormal."""
    model = bare(HRAConfig(r=10, init_weights=False), 6)
    matrix = maps_of(model, 6)[0].detach()
    assert orthogonality_error(matrix) < 1e-5
    assert float((matrix - torch.eye(6)).abs().max()) > 0.1
    strict: dict[str, Any] = {"apply_GS": True, "init_weights": False}
    with pytest.raises(ValueError, match=r"r=7 is too large for 'layers\.0' with apply_GS=True: .* at most 6 "):
        bare(HRAConfig(r=7, **strict), 6)
    torch.testing.assert_close(maps_of(bare(HRAConfig(r=6, **strict), 6), 6)[0], -torch.eye(6), rtol=0, atol=1e-5)


# -- the penalty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1e-4, 0.5])
def test_the_penalty_is_that_of_the_paper(weight: float) -> None:
    operator = HRAConfig(r=4, regularizer_weight=weight).build_operator("m", 9, 3)
    fill(operator, "uniform", 3.0, seed=1)
    units = operator.vectors / operator.vectors.norm(dim=1, keepdim=True)  # Uᵀ
    expected = weight * torch.linalg.matrix_norm(torch.eye(4) - units @ units.T).square()
    assert_penalty_is(operator, expected)


def test_the_penalty_of_known_directions() -> None:
    operator = HRAOperator(8, 4, regularizer_weight=1.0)
    with torch.no_grad():
        operator.vectors.copy_(torch.diag(torch.tensor([2.0, 0.1, 1.0, 5.0])).repeat(1, 2))
    assert float(operator.penalty().detach()) < 1e-10  # type: ignore[union-attr]  # orthogonal, of any length
    with torch.no_grad():
        operator.vectors[1] = operator.vectors[0]
    assert float(operator.penalty().detach()) == pytest.approx(2.0)  # type: ignore[union-attr]  # one pair, counted twice
    assert HRAOperator(8, 4).penalty() is None
    assert HRAConfig(r=4).build_operator("m", 9, 3).penalty() is None


# -- the strict form -----------------------------------------------------------------------------------------------


def test_the_strict_form_needs_a_start_off_the_identity() -> None:
    with pytest.raises(ValueError, match=r"apply_GS=True cannot start at the identity: .*init_weights=False"):
        HRAConfig(apply_GS=True)
    config = HRAConfig(r=4, apply_GS=True, init_weights=False)
    matrix = maps_of(bare(config, 12), 12)[0].detach()
    assert orthogonality_error(matrix) < 1e-5
    # I − 2 U Uᵀ turns exactly four directions round.
    torch.testing.assert_close(matrix.trace(), torch.tensor(12.0 - 8.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-6)


def test_the_strict_form_trains_and_stays_orthogonal() -> None:
    torch.manual_seed(2)
    target = strictly_reflected(torch.randn(4, 12))
    model = bare(HRAConfig(r=4, apply_GS=True, init_weights=False), 12).train()
    optimizer = torch.optim.Adam(trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (maps_of(model, 12)[0] - target).square().sum()
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in trainable(model).values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert orthogonality_error(maps_of(model, 12)[0]) < 1e-5


# -- LoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_change_of_the_weight_has_exactly_rank_r(strict: bool, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(20, 14, dtype=dtype))
    weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    config = HRAConfig(r=4, apply_GS=strict, target_modules=["0"], init_weights=False)
    model = adapt(base, config)
    layer = layers_of(model)[0]
    assert layer.supports_lora_conversion()
    up, down = layer.low_rank("default")
    assert up.shape == (14, 4)
    assert down.shape == (4, 20)
    vectors = layer.adapter("default").vectors.detach().to(dtype)
    expected = weight @ ((strictly_reflected if strict else reflected)(vectors).T - torch.eye(20, dtype=dtype))
    limit = 2e-6 if dtype == torch.float32 else 1e-6  # the directions are kept in float32
    assert relative_error(up @ down, expected) < limit
    assert relative_error(up @ down, layer.get_delta_weight("default")) < limit
    x = torch.randn(5, 20, dtype=dtype)
    assert relative_error(x @ weight.T + bias + (x @ down.to(dtype).T) @ up.to(dtype).T, model(x)) < limit


def test_the_low_rank_of_the_start_is_zero() -> None:
    layer = layers_of(adapt(nn.Sequential(nn.Linear(20, 14)), HRAConfig(r=4, target_modules=["0"])))[0]
    up, down = layer.low_rank("default")
    assert float((up @ down).detach().abs().max()) < 1e-6
    randomize(layer)
    up, down = layer.low_rank("default")
    assert float((up @ down).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("config", [OFTConfig(r=2), BOFTConfig(), GOFTConfig()], ids=lambda c: type(c).__name__)
def test_other_rotations_have_no_low_rank(config: Any) -> None:
    layer = layers_of(bare(config, 8))[0]
    assert not layer.supports_lora_conversion()
    with pytest.raises(ValueError, match="full rank"):
        layer.low_rank("default")


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 is not allowed; .*at least 1"),
        ({"r": -2}, "r=-2 is not allowed"),
        ({"r": 4.0}, r"r=4\.0 is not allowed; .*integer"),
        ({"r": True}, "r=True is not allowed"),
        ({"regularizer_weight": -1.0}, r"regularizer_weight=-1\.0 is not allowed; .*at least 0"),
        ({"regularizer_weight": float("nan")}, "regularizer_weight=nan"),
        ({"regularizer_weight": float("inf")}, "regularizer_weight=inf"),
        (
            {"apply_GS": True, "init_weights": False, "regularizer_weight": 1e-4},
            "regularizer_weight has no effect with apply_GS=True",
        ),
    ],
    ids=str,
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HRAConfig(**options)
