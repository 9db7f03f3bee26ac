"""Trees of Givens rotations against the same rotations applied one level after the other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_equal_with_gradients
from isotune.algebra.factors import BlockDiagonal, apply_chain, transpose_chain
from isotune.algebra.givens import givens_blocks, givens_chain, pair_penalty, rotation_pairs

SIZES = [2, 3, 4, 31, 32, 33, 34, 64, 65, 100, 1000, 1024, 1025, 4097]


def plain_rotations(angles: Tensor) -> Tensor:
    """The matrices that act on a row (a, b) as c a + s b, −s a + c b."""
    matrices = angles.new_zeros(*angles.shape, 2, 2)
    matrices[..., 0, 0], matrices[..., 1, 0] = angles.cos(), angles.sin()
    matrices[..., 0, 1], matrices[..., 1, 1] = -angles.sin(), angles.cos()
    return matrices


def twin(x: Tensor, matrices: Tensor) -> Tensor:
    """Each pair (i, i + s) of every level in its turn, from the highest level down; matrices are G, not G − I."""
    n = x.shape[-1]
    levels, start = [], 0
    stride = 1
    while stride < n:
        first = torch.arange(0, n - stride, 2 * stride)
        levels.append((first, first + stride, matrices[start : start + len(first)]))
        start += len(first)
        stride *= 2
    assert start == n - 1 == len(matrices)
    for i, j, own in reversed(levels):
        a, b = x[:, i], x[:, j]
        x = x.index_copy(1, i, a * own[:, 0, 0] + b * own[:, 1, 0])
        x = x.index_copy(1, j, a * own[:, 0, 1] + b * own[:, 1, 1])
    return x


def ours(x: Tensor, pairs: Tensor) -> Tensor:
    n = x.shape[-1]
    return apply_chain(x, givens_chain(n), givens_blocks(pairs, n))


def assert_equals_the_twin(n: int, angles: Tensor) -> None:
    angles = angles.detach().requires_grad_()
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    assert_equal_with_gradients(ours(x, rotation_pairs(angles)), twin(x, plain_rotations(angles)), [x, angles])


@pytest.mark.parametrize("n", SIZES)
def test_equals_its_twin(n: int) -> None:
    assert_equals_the_twin(n, 2 * torch.randn(n - 1, dtype=torch.float64))


@given(n=st.integers(2, 200), magnitude=st.floats(0.0, 1e3), seed=st.integers(0, 2**20))
def test_equals_its_twin_at_any_size(n: int, magnitude: float, seed: int) -> None:
    torch.manual_seed(seed)
    assert_equals_the_twin(n, magnitude * torch.randn(n - 1, dtype=torch.float64))


@pytest.mark.parametrize("n", SIZES)
def test_general_pairs_equal_their_twin(n: int) -> None:
    """Two by two matrices that are no rotations, as in qGOFT."""
    eye = torch.eye(2, dtype=torch.float64)
    pairs = (0.4 * torch.randn(n - 1, 2, 2, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    assert_equal_with_gradients(ours(x, pairs), twin(x, pairs + eye), [x, pairs])


@pytest.mark.parametrize("n", SIZES)
def test_every_angle_counts_and_the_first_coordinate_reaches_all(n: int) -> None:
    angles = (0.5 + torch.rand(n - 1, dtype=torch.float64)).requires_grad_()
    x = torch.eye(1, n, dtype=torch.float64)
    result = ours(x, rotation_pairs(angles))
    assert bool((result != 0).all())
    # From e₀ every coordinate is a product of sines and cosines; any angle changes some of them.
    (gradient,) = torch.autograd.grad(result, angles, torch.randn_like(result))
    assert gradient.shape == (n - 1,)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("n", [2, 5])
def test_gradcheck(n: int) -> None:
    angles = torch.randn(n - 1, dtype=torch.float64, requires_grad=True)
    pairs = torch.randn(n - 1, 2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: ours(x, rotation_pairs(a)), (x, angles))
    assert torch.autograd.gradcheck(ours, (x, pairs))


@pytest.mark.parametrize("n", [34, 67])
def test_gradcheck_where_there_are_several_grids(n: int) -> None:
    pairs = (0.3 * torch.randn(n - 1, 2, 2, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x, pairs), fast_mode=True)


@example(n=2, magnitude=1e3, seed=0)
@example(n=1025, magnitude=1e3, seed=0)
@given(
    n=st.sampled_from([2, 3, 31, 32, 33, 34, 64, 100, 257]),
    magnitude=st.floats(0.0, 1e3),
    seed=st.integers(0, 2**20),
)
def test_orthogonal_in_single_precision(n: int, magnitude: float, seed: int) -> None:
    torch.manual_seed(seed)
    matrix = ours(torch.eye(n), rotation_pairs(magnitude * (2 * torch.rand(n - 1) - 1))).double()
    assert (matrix.T @ matrix - torch.eye(n, dtype=torch.float64)).abs().max() <= 1e-5
    torch.testing.assert_close(torch.linalg.vector_norm(matrix, dim=1), torch.ones(n).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1000, 4097])
def test_each_folded_block_is_orthogonal_in_single_precision(n: int) -> None:
    for blocks in givens_blocks(rotation_pairs(1e3 * torch.randn(n - 1)), n):
        eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
        matrix = blocks.double() + eye
        assert (matrix.mT @ matrix - eye).abs().max() <= 1e-5


@pytest.mark.parametrize("n", SIZES)
def test_the_norm_of_rows_is_kept(n: int) -> None:
    x = torch.randn(8, n)
    result = ours(x, rotation_pairs(10 * torch.randn(n - 1)))
    assert not torch.allclose(result, x, atol=1e-2)
    torch.testing.assert_close(result.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_angle_zero_is_exactly_the_identity(n: int) -> None:
    x = torch.randn(3, n)
    pairs = rotation_pairs(torch.zeros(n - 1))
    assert not pairs.any()
    assert not any(blocks.any() for blocks in givens_blocks(pairs, n))
    assert torch.equal(ours(x, pairs), x)


def test_a_single_coordinate_has_nothing_to_rotate() -> None:
    assert givens_chain(1) == ()
    assert givens_blocks(torch.zeros(0, 2, 2), 1) == ()


@pytest.mark.parametrize("n", SIZES)
def test_the_tree_is_folded_into_few_factors(n: int) -> None:
    chain = givens_chain(n)
    # At most two for every five levels: the whole blocks of a grid and the incomplete one at its end.
    assert len(chain) <= 2 * math.ceil(math.log2(n) / 5)
    blocks = givens_blocks(torch.zeros(n - 1, 2, 2), n)
    for factor, own in zip(itertools.chain.from_iterable(whole.parts for whole in chain), blocks, strict=True):
        assert isinstance(factor, BlockDiagonal)
        covered = len(range(n)[factor.columns or slice(None)])
        assert own.shape == (covered // factor.size, factor.size, factor.size)
        assert covered % factor.size == 0


@pytest.mark.parametrize("n", [3, 33, 100])
def test_the_transposed_tree_undoes_it(n: int) -> None:
    blocks = givens_blocks(rotation_pairs(torch.randn(n - 1, dtype=torch.float64)), n)
    x = torch.randn(2, n, dtype=torch.float64)
    turned = apply_chain(x, givens_chain(n), blocks)
    assert not torch.allclose(turned, x)
    torch.testing.assert_close(apply_chain(turned, *transpose_chain(givens_chain(n), blocks)), x)


@pytest.mark.parametrize("n", [3, 34, 100])
def test_leading_dimensions_are_trees_by_themselves(n: int) -> None:
    pairs = torch.randn(2, 3, n - 1, 2, 2, dtype=torch.float64)
    together = givens_blocks(pairs, n)
    assert len(together) == sum(factor.count for factor in givens_chain(n))
    for i in range(2):
        for j in range(3):
            for all_blocks, own in zip(together, givens_blocks(pairs[i, j], n), strict=True):
                torch.testing.assert_close(all_blocks[i, j], own, rtol=1e-13, atol=1e-13)


def test_rotations_turn_the_documented_way() -> None:
    angles = torch.tensor([0.3, -2.0, 40.0], dtype=torch.float64)
    pairs = rotation_pairs(angles)
    torch.testing.assert_close(pairs + torch.eye(2, dtype=torch.float64), plain_rotations(angles))
    row = torch.tensor([1.0, 0.0], dtype=torch.float64) @ (
        rotation_pairs(angles.new_tensor(math.pi / 2)) + torch.eye(2)
    )
    torch.testing.assert_close(row, torch.tensor([0.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("angle", [1e-8, 1e-4, 1e-2])
def test_a_small_rotation_keeps_its_relative_precision(angle: float) -> None:
    single = torch.tensor([angle])
    exact = single.double()
    # cos − 1 by its series: the difference of the two would lose every digit.
    less = -exact.square() / 2 + exact**4 / 24
    torch.testing.assert_close(rotation_pairs(single)[:, 0, 0].double(), less, rtol=1e-6, atol=0)
    torch.testing.assert_close(rotation_pairs(single)[:, 1, 0].double(), exact.sin(), rtol=1e-6, atol=0)


def test_the_pair_penalty_is_the_sum_of_squared_column_products() -> None:
    pairs = torch.randn(3, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    expected = sum(float(m[0, 0] * m[0, 1] + m[1, 0] * m[1, 1]) ** 2 for m in pairs.detach().flatten(0, 1))
    assert pair_penalty(pairs).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(pair_penalty, pairs)


def test_rotations_have_no_pair_penalty() -> None:
    angles = torch.randn(50, dtype=torch.float64)
    assert pair_penalty(plain_rotations(angles)).item() < 1e-28
    # It asks for orthogonal columns, not for their length, and not for orthogonal rows.
    assert pair_penalty(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).item() == 0
    assert pair_penalty(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).item() == 1
    assert pair_penalty(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item() == 0
