"""The Cayley transform by Triton against float64, run by test_kernels.py.

Not collected by itself: Triton reads TRITON_INTERPRET when it is first imported, and a process that has it interprets
every kernel. With the variable the kernels run on the CPU, without it on a GPU.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from isotune.algebra import acceleration, elimination_kernels, launching
from isotune.algebra.cayley import orthogonal_difference
from isotune.algebra.elimination_kernels import can_eliminate, cayley_by_elimination
from isotune.algebra.skew import skew_from_vector, skew_size, vector_from_skew

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(INTERPRETED, reason="how a GPU is used, or a case in which the interpreter is slow")
every_path = pytest.mark.parametrize("n", [8, pytest.param(46, marks=on_gpu), 65])
"""A tile that is full, one that is not, which every_shape has too, and several."""
# One matrix, and more than a program takes; sizes that fill their tiles and such that do not, of one block to four.
SHAPES = [(1, 2), (9, 3), (19, 8), (1, 11), (3, 16), (2, 31), (2, 46), (1, 64), (1, 65)]
LARGE = [(1, 130)] if INTERPRETED else [(1, 200), (7, 256), (3, 352)]


def every_shape(name: str, values: list[Any]) -> pytest.MarkDecorator:
    """Every shape with these values; where the interpreter takes a second for each, a large one with the last alone."""
    cases = itertools.product([*SHAPES, *LARGE], values)
    some = [(*shape, value) for shape, value in cases if not INTERPRETED or shape[1] <= 32 or value is values[-1]]
    return pytest.mark.parametrize(("count", "n", name), some)


@pytest.fixture(autouse=True)
def _kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(acceleration, "DEVICE", DEVICE)
    torch.manual_seed(0)
    yield
    assert not launching._failed


def skew(count: int, n: int, norm: float) -> Tensor:
    """Matrices of the spectral norm `norm`."""
    matrix = torch.randn(count, n, n, dtype=torch.float64, device=DEVICE)
    matrix -= matrix.mT.clone()
    return (matrix * (norm / torch.linalg.matrix_norm(matrix, 2)[:, None, None])).float()


def exact(generator: Tensor) -> Tensor:
    """R − I = (I − Q)⁻¹ 2Q in float64."""
    generator = generator.double()
    return torch.linalg.solve(torch.eye(generator.shape[-1], device=DEVICE) - generator, 2 * generator)


def largest_defect(difference: Tensor) -> float:
    """The largest entry of RᵀR − I."""
    difference = difference.double()
    return float((difference + difference.mT + difference.mT @ difference).abs().max())


@every_shape("norm", [1e-6, 0.05, 1.0])
def test_relative_error(count: int, n: int, norm: float) -> None:
    generator = skew(count, n, norm)
    before = generator.clone()
    found, expected = cayley_by_elimination(generator), exact(generator)
    error = (found.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 5e-7
    assert torch.equal(generator, before)


@every_shape("bound", [(10.0, 5e-6), (100.0, 2e-5)])
def test_orthogonal(count: int, n: int, bound: tuple[float, float]) -> None:
    norm, limit = bound
    generator = skew(count, n, norm)
    found = cayley_by_elimination(generator)
    assert largest_defect(found) < limit
    torch.testing.assert_close(found.double(), exact(generator), rtol=0, atol=norm * limit)


@pytest.mark.parametrize("n", [2, 8, 33, 65])
def test_zero_is_exactly_the_identity(n: int) -> None:
    assert not cayley_by_elimination(torch.zeros(2, n, n, device=DEVICE)).any()


@every_path
def test_matrices_do_not_meet(n: int) -> None:
    """A matrix with an entry that is not a number spoils itself alone, and each is what it is by itself."""
    generator = skew(3, n, 0.5)
    alone = [cayley_by_elimination(matrix[None].clone()) for matrix in generator]
    generator[1, 0, 1] = float("nan")
    found = cayley_by_elimination(generator)
    for each in (0, 2):
        assert torch.equal(found[each], alone[each][0])
    assert found[1].isnan().any()


@every_path
def test_the_transform_takes_them_forward_and_backward(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    inner = elimination_kernels.cayley_by_elimination
    monkeypatch.setattr(elimination_kernels, "cayley_by_elimination", lambda q: taken.append(len(q)) or inner(q))
    entries = vector_from_skew(skew(6, n, 0.7)).view(2, 3, -1).requires_grad_()
    same = entries.detach().double().requires_grad_()
    weights = torch.randn(2, 3, n, n, device=DEVICE)
    found, expected = orthogonal_difference(entries, n), orthogonal_difference(same, n)
    assert taken == [6]
    assert found.shape == (2, 3, n, n)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((found * weights).sum(), entries)
    (reference,) = torch.autograd.grad((expected * weights).sum(), same)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-4)


def test_what_they_do_not_take() -> None:
    generator = skew(3, 16, 1.0)
    assert can_eliminate(generator)
    assert not can_eliminate(generator.double())
    assert not can_eliminate(generator.bfloat16())
    assert not can_eliminate(generator[:0])
    assert not can_eliminate(generator.mT)
    assert not can_eliminate(generator[:, :1, :1].clone())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert not can_eliminate(torch.empty_like(generator))


@pytest.mark.parametrize("n", [16, 70])
def test_a_triton_that_cannot_run_is_replaced(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Failed to find C compiler")

    for name in ("_whole", "_others"):
        monkeypatch.setattr(elimination_kernels, name, Broken())
    monkeypatch.setattr(launching, "_failed", False)
    entries = torch.randn(3, skew_size(n), device=DEVICE) / n
    expected = exact(skew_from_vector(entries, n))
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        found = orthogonal_difference(entries, n)
    for each in (found, orthogonal_difference(entries, n)):  # the second time without a warning
        torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(launching, "_failed", False)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = torch.randn(3, skew_size(16), device=DEVICE) / 16
    assert acceleration.load("elimination_kernels") is elimination_kernels
    acceleration.load.cache_clear()
    try:
        monkeypatch.setitem(sys.modules, "isotune.algebra.elimination_kernels", None)
        monkeypatch.delattr("isotune.algebra.elimination_kernels")
        assert acceleration.load("elimination_kernels") is None
        found = orthogonal_difference(entries, 16)
    finally:
        acceleration.load.cache_clear()
    torch.testing.assert_close(found.double(), exact(skew_from_vector(entries, 16)), rtol=1e-5, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("n", [32, 46, 128])
def test_tf32_is_not_used(n: int) -> None:
    generator = skew(4, n, 1.0)
    plain = cayley_by_elimination(generator)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert torch.equal(cayley_by_elimination(generator), plain)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert largest_defect(plain) < 1e-6


@on_gpu
@pytest.mark.parametrize("n", [8, 46, 64, 128, 352])
def test_captured_in_a_graph_without_a_wait(n: int) -> None:
    entries = 0.1 * torch.randn(7, skew_size(n), device=DEVICE)
    orthogonal_difference(entries, n)
    torch.cuda.set_sync_debug_mode("error")
    try:
        orthogonal_difference(entries, n)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = orthogonal_difference(entries, n)
    entries.copy_(0.1 * torch.randn_like(entries))
    graph.replay()
    assert torch.equal(captured, orthogonal_difference(entries, n))
