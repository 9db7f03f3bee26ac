"""Folded butterfly products against the same stages applied one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_equal_with_gradients
from isotune.algebra import butterfly
from isotune.algebra.butterfly import MAX_BLOCK, butterfly_blocks, butterfly_chain
from isotune.algebra.cayley import orthogonal_difference
from isotune.algebra.factors import apply_chain, transpose_chain
from isotune.algebra.skew import skew_size


def width(size: int, stages: int, outer: int) -> int:
    return size * 2 ** (stages - 1) * outer


def twin(x: Tensor, stages: Tensor) -> Tensor:
    """Stage by stage: chunks of b / 2 coordinates in pairs 1, 2, 4, … apart, each pair by its own matrix I + D."""
    n, size = x.shape[-1], stages.shape[-1]
    if stages.shape[0] == 1:  # the only case in which b may be odd
        return x + (x.view(-1, n // size, 1, size) @ stages[0]).flatten(1)
    half = size // 2
    for place, stage in reversed(list(enumerate(stages))):  # the largest stride acts first
        apart = 2**place
        firsts = [chunk for chunk in range(n // half) if (chunk // apart) % 2 == 0]
        result = x.clone()
        for first, own in zip(firsts, stage, strict=True):
            columns = [chunk * half + k for chunk in (first, first + apart) for k in range(half)]
            result[:, columns] = x[:, columns] + x[:, columns] @ own
        x = result
    return x


def random_stages(size: int, stages: int, outer: int, scale: float = 0.3) -> Tensor:
    count = 2 ** (stages - 1) * outer
    return (scale * torch.randn(stages, count, size, size, dtype=torch.float64) / size**0.5).requires_grad_()


def ours(x: Tensor, stages: Tensor) -> Tensor:
    chain = butterfly_chain(x.shape[-1], stages.shape[-1], stages.shape[-4])
    return apply_chain(x, chain, butterfly_blocks(stages, stages.shape[-1]))


def assert_equals_the_twin(size: int, count: int, outer: int) -> None:
    stages = random_stages(size, count, outer)
    x = torch.randn(2, width(size, count, outer), dtype=torch.float64, requires_grad=True)
    assert_equal_with_gradients(ours(x, stages), twin(x, stages), [x, stages])


@pytest.mark.parametrize("stages", range(1, 8))
@pytest.mark.parametrize("size", [2, 4])
def test_equals_its_twin(size: int, stages: int) -> None:
    assert_equals_the_twin(size, stages, outer=1)


@given(
    size=st.sampled_from([2, 4, 6, 8]), stages=st.integers(1, 4), outer=st.integers(1, 3), seed=st.integers(0, 2**20)
)
def test_equals_its_twin_at_any_size(size: int, stages: int, outer: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert_equals_the_twin(size, stages, outer)


@pytest.mark.parametrize(
    ("size", "stages", "outer", "factors"),
    [
        (2, 6, 1, 1),
        (2, 7, 2, 2),
        (4, 7, 1, 2),
        (16, 5, 3, 2),
        (32, 5, 1, 3),
        (32, 4, 2, 2),
        (64, 3, 1, 3),
        (66, 2, 1, 2),
    ],
)
def test_what_does_not_fit_one_block_is_permuted(size: int, stages: int, outer: int, factors: int) -> None:
    chain = butterfly_chain(width(size, stages, outer), size, stages)
    assert len(chain) == factors
    assert [factor.permuted for factor in chain] == [True] * (factors - 1) + [False]  # type: ignore[attr-defined]
    assert all(factor.size <= max(size, MAX_BLOCK) for factor in chain)  # type: ignore[attr-defined]
    assert_equals_the_twin(size, stages, outer)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_single_stage_may_have_odd_blocks(size: int) -> None:
    assert_equals_the_twin(size, 1, outer=4)


@given(
    limit=st.sampled_from([2, 4, 8, 16, 32]),
    size=st.sampled_from([2, 4]),
    stages=st.integers(2, 5),
    outer=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_the_map_does_not_depend_on_how_stages_are_folded(
    limit: int, size: int, stages: int, outer: int, seed: int
) -> None:
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(butterfly, "MAX_BLOCK", limit)
        assert_equals_the_twin(size, stages, outer)


@pytest.mark.parametrize("limit", [2, 4, 64])
def test_gradcheck(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(butterfly, "MAX_BLOCK", limit)
    stages = random_stages(2, 3, 1)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x, stages))


@pytest.mark.parametrize(("size", "stages"), [(2, 7), (8, 4), (16, 5), (3, 1)])
def test_zero_stages_are_exactly_the_identity(size: int, stages: int) -> None:
    x = torch.randn(3, width(size, stages, 2))
    zero = torch.zeros(stages, x.shape[1] // size, size, size)
    assert not any(blocks.any() for blocks in butterfly_blocks(zero, size))
    assert torch.equal(ours(x, zero), x)


@given(
    size=st.sampled_from([2, 4, 8, 32]),
    stages=st.integers(1, 4),
    magnitude=st.floats(0.0, 10.0),
    seed=st.integers(0, 2**20),
)
def test_rotations_give_an_orthogonal_map_in_single_precision(
    size: int, stages: int, magnitude: float, seed: int
) -> None:
    torch.manual_seed(seed)
    n = width(size, stages, 1)
    entries = torch.randn(stages, n // size, skew_size(size)) * (2**0.5 * magnitude / size)
    matrix = ours(torch.eye(n), orthogonal_difference(entries, size)).double()
    assert (matrix.T @ matrix - torch.eye(n, dtype=torch.float64)).abs().max() <= 1e-5


@pytest.mark.parametrize(("size", "stages"), [(2, 3), (2, 7), (8, 4)])
def test_all_stages_together_reach_every_coordinate(size: int, stages: int) -> None:
    n = width(size, stages, 2)
    matrix = ours(torch.eye(n, dtype=torch.float64), random_stages(size, stages, 2, scale=1.0))
    # Two separate butterflies, each of them dense.
    expected = torch.block_diag(*torch.ones(2, n // 2, n // 2)) != 0
    assert torch.equal(matrix != 0, expected)


@pytest.mark.parametrize(("size", "stages"), [(2, 3), (2, 7), (16, 5)])
def test_the_transposed_chain_multiplies_by_the_transpose(size: int, stages: int) -> None:
    n = width(size, stages, 1)
    tensors = random_stages(size, stages, 1).detach()
    matrix = twin(torch.eye(n, dtype=torch.float64), tensors)
    x = torch.randn(2, n, dtype=torch.float64)
    turned, blocks = transpose_chain(butterfly_chain(n, size, stages), butterfly_blocks(tensors, size))
    torch.testing.assert_close(apply_chain(x, turned, blocks), x @ matrix.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("size", "stages"), [(3, 1), (4, 3), (2, 7)])
def test_leading_dimensions_are_butterflies_by_themselves(size: int, stages: int) -> None:
    n = width(size, stages, 2)
    tensors = torch.randn(2, 3, stages, n // size, size, size, dtype=torch.float64)
    together = butterfly_blocks(tensors, size)
    assert len(together) == len(butterfly_chain(n, size, stages))
    for i in range(2):
        for j in range(3):
            for all_blocks, own in zip(together, butterfly_blocks(tensors[i, j], size), strict=True):
                torch.testing.assert_close(all_blocks[i, j], own, rtol=1e-13, atol=1e-12)
