"""Chains of structured factors against the product of their dense matrices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.adapter.kernels import rotated_linear
from isotune.algebra.factors import (
    BlockDiagonal,
    Chain,
    Factor,
    LowRank,
    Nested,
    Pairs,
    apply_chain,
    chain_backward,
    chain_forward,
    refuse_double_backward,
    split_tensors,
    transpose_chain,
)

N = 12
ORDER = torch.tensor([7, 0, 11, 3, 1, 10, 2, 9, 4, 6, 5, 8])  # not its own inverse
FACTORS: dict[str, Factor] = {
    "all columns": BlockDiagonal(3),
    "blocks of one": BlockDiagonal(1),
    "one block": BlockDiagonal(N),
    "adjacent columns": BlockDiagonal(4, slice(2, 10)),
    "every second column": BlockDiagonal(3, slice(0, N, 2)),
    "every third column, not from 0": BlockDiagonal(2, slice(1, N, 3)),
    "a stop past the end": BlockDiagonal(3, slice(0, 20, 4)),
    "permuted": BlockDiagonal(4, order=ORDER),
    "low rank": LowRank(),
    "nested": Nested(3, N // 3),
    "pairs": Pairs(4),
    "pairs across": Pairs(N),
}
LONG = ["permuted", "low rank", "every second column", "all columns", "adjacent columns"]


def random_tensors(factor: Factor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaves that ask for gradients, of the shapes that the factor takes on N columns."""
    if isinstance(factor, BlockDiagonal):
        count = len(range(N)[factor.columns or slice(None)]) // factor.size
        shapes = [(count, factor.size, factor.size)]
    elif isinstance(factor, Nested):
        shapes = [(1, N // 3, N // 3), (N // 3, 3, 3)]
    elif isinstance(factor, Pairs):
        shapes = [(N,), (N,)]
    else:
        shapes = [(N, 2), (2, N)]
    return [(0.5 * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]


def build(names: Sequence[str], dtype: torch.dtype = torch.float64) -> tuple[Chain, list[Tensor]]:
    chain = tuple(FACTORS[name] for name in names)
    return chain, [tensor for factor in chain for tensor in random_tensors(factor, dtype)]


def dense(chain: Chain, tensors: Sequence[Tensor]) -> Tensor:
    """(I + D₁)(I + D₂) … in full, differentiably."""
    matrix = torch.eye(N, dtype=tensors[0].dtype)
    rest = list(tensors)
    for factor in itertools.chain.from_iterable(whole.parts for whole in chain):
        eye = torch.eye(N, dtype=matrix.dtype)
        if isinstance(factor, LowRank):
            matrix = matrix @ (eye + rest.pop(0) @ rest.pop(0))
            continue
        if isinstance(factor, Pairs):
            partner = torch.arange(N).view(-1, 2, factor.group // 2).flip(1).flatten()
            matrix = matrix @ (eye + torch.diag(rest.pop(0)) + eye[partner] * rest.pop(0))
            continue
        assert isinstance(factor, BlockDiagonal)
        places = ORDER if factor.permuted else torch.arange(N)[factor.columns or slice(None)]
        chosen = eye[places]
        matrix = matrix @ (eye + chosen.T @ torch.block_diag(*rest.pop(0)) @ chosen)
    assert not rest
    return matrix


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor], gradient: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(ours, inputs, gradient)
    expected = torch.autograd.grad(theirs, inputs, gradient)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


names = st.lists(st.sampled_from(sorted(FACTORS)), min_size=1, max_size=4)
shapes = st.sampled_from([(N,), (1, N), (5, N), (2, 3, N), (2, 1, 3, N)])


@given(names=names, shape=shapes, seed=st.integers(0, 2**20))
def test_a_chain_is_the_product_of_its_matrices(names: list[str], shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    chain, tensors = build(names)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours = apply_chain(x, chain, tensors)
    assert ours.shape == x.shape
    assert_same_gradients(ours, x @ dense(chain, tensors), [x, *tensors], torch.randn_like(x))


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_each_factor_by_itself(name: str) -> None:
    chain, tensors = build([name])
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    ours = apply_chain(x, chain, tensors)
    assert_same_gradients(ours, x @ dense(chain, tensors), [x, *tensors], torch.randn_like(x))
    assert torch.equal(x, before)
    assert ours.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_gradcheck_of_each_factor(name: str) -> None:
    chain, tensors = build([name])
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *t: apply_chain(x, chain, t), (x, *tensors))


def test_gradcheck_of_a_long_chain() -> None:
    chain, tensors = build(LONG)
    x = torch.randn(2, 1, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *t: apply_chain(x, chain, t), (x, *tensors), fast_mode=True)


@given(names=names, seed=st.integers(0, 2**20))
def test_the_transposed_chain_multiplies_by_the_transpose(names: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    chain, tensors = build(names)
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    turned, turned_tensors = transpose_chain(chain, tensors)
    ours = apply_chain(x, turned, turned_tensors)
    assert_same_gradients(ours, x @ dense(chain, tensors).T, [x, *tensors], torch.randn_like(x))


@pytest.mark.parametrize("name", ["low rank", "permuted", "every third column, not from 0"])
def test_transposing_twice_changes_nothing(name: str) -> None:
    chain, tensors = build([name, "all columns"])
    again, same = transpose_chain(*transpose_chain(chain, tensors))
    assert again == chain
    for one, other in zip(same, tensors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_a_zero_difference_changes_no_bit(name: str) -> None:
    chain, tensors = build([name], torch.float32)
    x = torch.randn(50, N) * torch.logspace(-20, 20, N)
    assert torch.equal(apply_chain(x, chain, [torch.zeros_like(t) for t in tensors]), x)


@pytest.mark.parametrize("name", ["all columns", "adjacent columns", "permuted"])
def test_columns_outside_keep_their_bits_and_blocks_do_not_mix(name: str) -> None:
    chain, tensors = build([name], torch.float32)
    x = torch.randn(4, N)
    only_first = tensors[0].detach().clone()
    only_first[1:] = 0
    places = ORDER if name == "permuted" else torch.arange(N)[FACTORS[name].columns or slice(None)]  # type: ignore[attr-defined]
    size = only_first.shape[-1]
    touched = torch.zeros(N, dtype=torch.bool)
    touched[places[:size]] = True
    changed = (apply_chain(x, chain, [only_first]) != x).any(0)
    assert torch.equal(changed, touched)


@pytest.mark.parametrize("names", [["all columns"], ["permuted"], ["every second column", "low rank"], LONG])
def test_inputs_and_gradients_that_are_not_contiguous(names: list[str]) -> None:
    chain, tensors = build(names)
    tensors = [t.detach().mT.contiguous().mT.requires_grad_() for t in tensors]
    x = torch.randn(N, 3, 5, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    gradient = torch.randn(3, N, 5, dtype=torch.float64).permute(2, 0, 1)
    assert not x.is_contiguous()
    assert not gradient.is_contiguous()
    expected = x @ dense(chain, tensors)
    assert_same_gradients(apply_chain(x, chain, tensors), expected, [x, *tensors], gradient)
    # What `sum` sends back has stride zero.
    stretched = torch.ones((), dtype=torch.float64).expand(x.shape)
    assert_same_gradients(apply_chain(x, chain, tensors), x @ dense(chain, tensors), [x, *tensors], gradient=stretched)


@pytest.mark.parametrize("name", sorted(FACTORS))
@pytest.mark.parametrize("shape", [(0, N), (2, 0, N)])
def test_an_empty_batch(name: str, shape: tuple[int, ...]) -> None:
    chain, tensors = build([name, name])
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    result = apply_chain(x, chain, tensors)
    assert result.shape == shape
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.parametrize(
    "wanted", [[True, False, False, False], [False, True, True, True], [False, False, False, True]]
)
def test_only_what_needs_a_gradient_gets_one(wanted: list[bool]) -> None:
    chain, tensors = build(["permuted", "low rank"])
    inputs = [torch.randn(3, N, dtype=torch.float64), *(t.detach() for t in tensors)]
    full = [t.clone().requires_grad_() for t in inputs]
    (full[0] @ dense(chain, full[1:])).square().sum().backward()
    some = [t.clone().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
    apply_chain(some[0], chain, some[1:]).square().sum().backward()
    for one, other, need in zip(some, full, wanted, strict=True):
        if need:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
        else:
            assert one.grad is None


def test_without_anything_to_train_there_is_no_graph() -> None:
    chain, tensors = build(LONG)
    frozen = [t.detach() for t in tensors]
    x = torch.randn(2, N, dtype=torch.float64)
    result = apply_chain(x, chain, frozen)
    assert not result.requires_grad
    assert torch.equal(result, chain_forward(x, chain, frozen))


@pytest.mark.parametrize("names", [["low rank"], ["permuted"], LONG])
def test_the_gradient_of_x_is_left_out_where_nobody_asks(names: list[str]) -> None:
    chain, tensors = build(names)
    x, gradient = torch.randn(2, 3, N, dtype=torch.float64)
    with torch.no_grad():
        skipped, grads = chain_backward(x, gradient, chain, tensors, needs_x=False)
        computed, same = chain_backward(x, gradient, chain, tensors, needs_x=True)
    assert skipped is None
    torch.testing.assert_close(computed, gradient @ dense(chain, tensors).detach().T, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(one, other) for one, other in zip(grads, same, strict=True))


def test_tensors_are_split_in_order() -> None:
    chain, tensors = build(["low rank", "permuted", "low rank"])
    parts = split_tensors(chain, tensors)
    assert [len(part) for part in parts] == [2, 1, 2]
    assert all(one is other for one, other in zip((t for part in parts for t in part), tensors, strict=True))


def kept_by(node: Any, saved: list[Tensor]) -> list[Tensor]:
    """What a node keeps for backward: what the hooks saw, and any tensor set as an attribute behind their back."""
    return saved + [value for value in vars(node).values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("length", [1, 2, 5, 20])
def test_a_chain_keeps_its_input_and_its_tensors_only(length: int) -> None:
    chain, tensors = build((LONG * 4)[:length])
    x = torch.randn(64, N, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = apply_chain(x, chain, tensors)
    kept = kept_by(result.grad_fn, saved)
    # By address: x itself and not a copy, so that layers that read the same x share it.
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in [x, *tensors])
    assert sum(t.nbytes for t in kept) == x.nbytes + sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("length", [1, 5])
def test_a_gained_layer_keeps_no_output(length: int) -> None:
    chain, tensors = build(LONG[:length])
    x = torch.randn(2, 32, N, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(7, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(7, N, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = rotated_linear(x, gain, chain, tensors, weight, bias)
    allowed = {t.data_ptr() for t in [x, gain, weight, bias, *tensors]}
    assert {t.data_ptr() for t in kept_by(result.grad_fn, saved)} <= allowed
    assert x.data_ptr() in {t.data_ptr() for t in saved}


@given(
    names=names,
    shape=shapes,
    out=st.sampled_from([1, 5, N, 20]),
    has_bias=st.booleans(),
    contiguous=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_rotated_linear_equals_plain_torch(
    names: list[str], shape: tuple[int, ...], out: int, has_bias: bool, contiguous: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    chain, tensors = build(names)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(out, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(out, N, dtype=torch.float64) if contiguous else torch.randn(N, out, dtype=torch.float64).T
    bias = torch.randn(out, dtype=torch.float64) if has_bias else None
    ours = rotated_linear(x, gain, chain, tensors, weight, bias)
    theirs = gain * (x @ dense(chain, tensors) @ weight.T)
    if bias is not None:
        theirs = theirs + bias
    gradient = torch.randn_like(theirs)
    if not contiguous:
        gradient = torch.randn(*reversed(theirs.shape), dtype=torch.float64).permute(*reversed(range(theirs.dim())))
    assert ours.shape == (*shape[:-1], out)
    assert_same_gradients(ours, theirs, [x, gain, *tensors], gradient)


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradcheck_of_rotated_linear(has_bias: bool) -> None:
    chain, tensors = build(["every second column", "low rank"])
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, N, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64) if has_bias else None
    assert torch.autograd.gradcheck(
        lambda x, gain, *t: rotated_linear(x, gain, chain, t, weight, bias), (x, gain, *tensors)
    )


@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False, False, True]])
def test_rotated_linear_with_one_input_to_train(wanted: list[bool]) -> None:
    chain, tensors = build(["permuted"])
    weight, bias = torch.randn(4, N, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    inputs = [torch.randn(3, N, dtype=torch.float64), torch.randn(4, dtype=torch.float64), tensors[0].detach()]
    full = [t.clone().requires_grad_() for t in inputs]
    (full[1] * (full[0] @ dense(chain, full[2:]) @ weight.T) + bias).square().sum().backward()
    some = [t.clone().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
    rotated_linear(some[0], some[1], chain, some[2:], weight, bias).square().sum().backward()
    for one, other, need in zip(some, full, wanted, strict=True):
        if need:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
        else:
            assert one.grad is None


@pytest.mark.parametrize("name", ["low rank", "all columns", "permuted"])
def test_rotated_linear_of_an_empty_batch(name: str) -> None:
    chain, tensors = build([name])
    x = torch.zeros(2, 0, N, dtype=torch.float64, requires_grad=True)
    gain = torch.ones(4, dtype=torch.float64, requires_grad=True)
    result = rotated_linear(x, gain, chain, tensors, torch.randn(4, N, dtype=torch.float64), None)
    assert result.shape == (2, 0, 4)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for tensor in (gain, *tensors):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_a_second_derivative_is_refused() -> None:
    chain, tensors = build(["all columns"])
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    gain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, N, dtype=torch.float64)
    for result in (apply_chain(x, chain, tensors), rotated_linear(x, gain, chain, tensors, weight, None)):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(result.square().sum(), tensors, create_graph=True)
    with torch.no_grad():
        refuse_double_backward()
