"""The rotation of blocks by Triton against plain torch in float64, run by test_kernels.py.

Not collected by itself: Triton reads TRITON_INTERPRET when it is first imported, and a process that has it interprets
every kernel. With the variable the kernels run on the CPU, without it on a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import relative_error
from isotune.algebra import acceleration, block_kernels, launching
from isotune.algebra.block_kernels import rotate_blocks, rotate_blocks_backward
from isotune.algebra.factors import BlockDiagonal, LowRank, Nested, apply_chain, chain_backward, chain_forward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(INTERPRETED, reason="how a GPU is used, or a case in which the interpreter is slow")
# The interpreter computes both half precisions alike, in float32, and is slow.
DTYPES = [torch.float32, torch.bfloat16, *([] if INTERPRETED else [torch.float16])]
SIZES = [8, 16, 32, 64]
# Tokens and blocks that fill no tile, one that do exactly, several splits of the rows, one token.
SHAPES = [(1, 1), (1, 5), (17, 3), (64, 8), (77, 9), (301, 2)]
every_case = pytest.mark.parametrize(("tokens", "count"), SHAPES)
every_size = pytest.mark.parametrize("size", SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

if INTERPRETED:
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_floats(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """A product whose bfloat16 operands, which the interpreter keeps as their bits, are multiplied as numbers."""
        a, b = (
            interpreter.TensorHandle((h.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)
            if h.dtype.scalar == interpreter.tl.bfloat16
            else h
            for h in (a, b)
        )
        return create_dot(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = dot_of_floats


@pytest.fixture(autouse=True)
def _kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(acceleration, "DEVICE", DEVICE)
    monkeypatch.setattr(block_kernels, "SIZES", dict.fromkeys(DTYPES, SIZES))
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    assert not launching._failed


def make(tokens: int, count: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient of x (I + D), and D."""
    x, gradient = (torch.randn(tokens, count * size, device=DEVICE).to(dtype) for _ in range(2))
    return x, gradient, (0.3 * torch.randn(count, size, size, device=DEVICE)).to(dtype)


def twin(x: Tensor, blocks: Tensor) -> Tensor:
    """x (I + D) in float64 by plain torch, differentiably."""
    return x.double() + x.double() @ torch.block_diag(*blocks.double())


def twin_gradients(x: Tensor, gradient: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and of the blocks by autograd, in float64."""
    x, blocks = x.double().requires_grad_(), blocks.double().requires_grad_()
    with torch.enable_grad():
        result = twin(x, blocks)
    return torch.autograd.grad(result, (x, blocks), gradient.double())


def assert_rounded_once(found: Tensor, exact: Tensor, terms: int) -> None:
    """At most one unit in the last place, and what a sum of so many products of size 1 loses in float32."""
    assert found.shape == exact.shape
    rest = 4 * torch.finfo(torch.float32).eps * terms
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(found.dtype).eps, atol=rest)


@every_dtype
@every_size
@every_case
def test_forward(tokens: int, count: int, size: int, dtype: torch.dtype) -> None:
    x, _, blocks = make(tokens, count, size, dtype)
    before = x.clone()
    y = rotate_blocks(x, blocks)
    assert y is not None
    assert y.dtype == dtype
    assert_rounded_once(y, twin(x, blocks), size)
    assert torch.equal(x, before)
    assert_rounded_once(rotate_blocks(x, blocks.mT), twin(x, blocks.mT), size)
    assert rotate_blocks(x, blocks, in_place=True) is x
    assert torch.equal(x, y)


@every_dtype
@every_size
@every_case
def test_backward(tokens: int, count: int, size: int, dtype: torch.dtype) -> None:
    x, gradient, blocks = make(tokens, count, size, dtype)
    before = x.clone(), gradient.clone()
    of_x, of_blocks = twin_gradients(x, gradient, blocks)
    grad_x, grad_blocks, none = rotate_blocks_backward(x, gradient, blocks, needs_x=True)
    assert none is None
    assert grad_x.dtype == grad_blocks.dtype == dtype
    assert_rounded_once(grad_x, of_x, size)
    assert_rounded_once(grad_blocks, of_blocks, tokens)
    assert torch.equal(x, before[0])
    assert torch.equal(gradient, before[1])
    none, same, _ = rotate_blocks_backward(x, gradient, blocks, needs_x=False)
    assert none is None
    assert torch.equal(same, grad_blocks)
    assert torch.equal(gradient, before[1])
    written, same, _ = rotate_blocks_backward(x, gradient, blocks, needs_x=True, in_place=True)
    assert written is gradient
    assert torch.equal(gradient, grad_x)
    assert torch.equal(same, grad_blocks)


@every_dtype
@every_size
def test_rows_with_a_stride(size: int, dtype: torch.dtype) -> None:
    wide, wide_gradient, blocks = make(37, 6, size, dtype)
    x, gradient, blocks = wide[:, size : 4 * size], wide_gradient[:, 2 * size : 5 * size], blocks[:3]
    before = wide.clone()
    whole = [t.contiguous() for t in (x, gradient)]
    y = rotate_blocks(x, blocks)
    assert torch.equal(y, rotate_blocks(whole[0], blocks))
    for found, expected in zip(
        rotate_blocks_backward(x, gradient, blocks, True)[:2],
        rotate_blocks_backward(*whole, blocks, True)[:2],
        strict=True,
    ):
        assert torch.equal(found, expected)
    rotate_blocks(x, blocks, in_place=True)
    before[:, size : 4 * size] = y
    assert torch.equal(wide, before)


@every_dtype
@every_size
def test_no_rotation_changes_no_bit(size: int, dtype: torch.dtype) -> None:
    x, gradient, blocks = make(41, 3, size, dtype)
    assert torch.equal(rotate_blocks(x, torch.zeros_like(blocks)), x)
    assert torch.equal(rotate_blocks_backward(x, gradient, torch.zeros_like(blocks), True)[0], gradient)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_rows_divided_among_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gradient, blocks = make(400, 3, 16, torch.float32)
    monkeypatch.setattr(block_kernels, "PROGRAMS", programs)
    grad_x, grad_blocks, _ = rotate_blocks_backward(x, gradient, blocks, True)
    of_x, of_blocks = twin_gradients(x, gradient, blocks)
    assert_rounded_once(grad_x, of_x, 16)
    assert_rounded_once(grad_blocks, of_blocks, 400)
    assert torch.equal(rotate_blocks_backward(x, gradient, blocks, True)[1], grad_blocks)


@every_dtype
@every_size
def test_a_factor_takes_them_in_both_directions(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        inner = getattr(block_kernels, name)
        return lambda *args: taken.append(name) or inner(*args)

    for name in ("rotate_blocks", "rotate_blocks_backward"):
        monkeypatch.setattr(block_kernels, name, noted(name))
    x, gradient, blocks = make(29, 4, size, dtype)
    x.requires_grad_()
    blocks.requires_grad_()
    with torch.enable_grad():
        y = apply_chain(x, (BlockDiagonal(size),), [blocks])
    assert_rounded_once(y.detach(), twin(x, blocks), size)
    for found, expected, terms in zip(
        torch.autograd.grad(y, (x, blocks), gradient), twin_gradients(x, gradient, blocks), (size, 29), strict=True
    ):
        assert_rounded_once(found, expected, terms)
    assert taken == ["rotate_blocks", "rotate_blocks_backward"]


def test_in_a_chain_with_other_factors() -> None:
    n = 96
    x, gradient, blocks = make(33, n // 16, 16, torch.float32)
    chain = BlockDiagonal(16), LowRank(), BlockDiagonal(16, order=torch.randperm(n)), BlockDiagonal(16)
    left, right = (0.1 * torch.randn(shape, device=DEVICE) for shape in ((n, 2), (2, n)))
    tensors = [blocks, left, right, blocks.flip(0), blocks.roll(1, 0)]
    y = chain_forward(x, chain, tensors)
    grad_x, grads = chain_backward(x, gradient.clone(), chain, tensors, needs_x=True, in_place=True)
    exact = [tensor.double() for tensor in tensors]
    torch.testing.assert_close(y.double(), chain_forward(x.double(), chain, exact), rtol=1e-5, atol=1e-5)
    of_x, of_tensors = chain_backward(x.double(), gradient.double(), chain, exact, needs_x=True)
    for found, expected in zip((grad_x, *grads), (of_x, *of_tensors), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "count", "size"),
    [(1, 5, 8), (1, 5, 32), (17, 2, 8), (17, 2, 32), (77, 24, 8), pytest.param(77, 24, 32, marks=on_gpu)],
)
def test_a_dense_matrix_on_the_first_columns(tokens: int, count: int, size: int, dtype: torch.dtype) -> None:
    """Both factors in one pass, in either direction, and the same as one after the other without kernels."""
    x, gradient, blocks = make(tokens, count, size, dtype)
    dense = (0.3 * torch.randn(1, count, count, device=DEVICE)).to(dtype)
    before = x.clone(), gradient.clone()
    nested, tensors = Nested(size, count), [dense, blocks]
    exact = [tensor.double() for tensor in tensors]

    def assert_near(found: Tensor, expected: Tensor) -> None:
        assert found.dtype == dtype
        assert relative_error(found, expected) < 4 * torch.finfo(dtype).eps

    y = nested.apply(x, tensors)
    assert_near(y, chain_forward(x.double(), nested.parts, exact))
    of_x, of_tensors = chain_backward(x.double(), gradient.double(), nested.parts, exact, needs_x=True)
    grad_x, grads = nested.backward(x, gradient, tensors, needs_x=True)
    for found, expected in zip((grad_x, *grads), (of_x, *of_tensors), strict=True):
        assert_near(found, expected)
    none, same = nested.backward(x, gradient, tensors, needs_x=False)
    assert none is None
    assert all(map(torch.equal, same, grads))
    assert torch.equal(x, before[0])
    assert torch.equal(gradient, before[1])
    written, _ = nested.backward(x, gradient, tensors, needs_x=True, in_place=True)
    assert written is gradient
    assert torch.equal(gradient, grad_x)
    assert nested.apply(x, tensors, in_place=True) is x
    assert torch.equal(x, y)
    still = [torch.zeros_like(tensor) for tensor in tensors]
    assert torch.equal(nested.apply(x, still), x)


def test_what_they_do_not_take() -> None:
    x, gradient, blocks = make(5, 3, 16, torch.float32)
    can = block_kernels.can_rotate
    assert can(blocks, x, gradient)
    assert can(blocks.mT, x[::2], gradient[1::2])
    assert not can(blocks, x.double())
    assert not can(blocks.double(), x.double())
    assert not can(blocks.bfloat16(), x)
    assert not can(blocks, x, gradient[:0])
    assert not can(blocks, x.t().contiguous().t())
    assert not can(blocks, x, x.new_ones(()).expand(x.shape))
    assert not can(blocks[:, :12, :12], x)
    with torch.enable_grad():
        assert not can(blocks, x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert not can(torch.empty_like(blocks), torch.empty_like(x))


def test_a_triton_that_cannot_run_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Failed to find C compiler")

    for name in ("_rotate", "_rotate_backward"):
        monkeypatch.setattr(block_kernels, name, Broken())
    monkeypatch.setattr(launching, "_failed", False)
    x, gradient, blocks = make(5, 3, 16, torch.float32)
    factor, exact = BlockDiagonal(16), twin_gradients(x, gradient, blocks)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert_rounded_once(factor.apply(x, [blocks]), twin(x, blocks), 16)
    assert factor.apply(x, [blocks]).shape == x.shape  # without a second warning
    monkeypatch.setattr(launching, "_failed", False)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        grad_x, (grad_blocks,) = factor.backward(x, gradient, [blocks], True, in_place=True)
    monkeypatch.setattr(launching, "_failed", False)
    for found, expected, terms in zip((grad_x, grad_blocks), exact, (16, 5), strict=True):
        assert_rounded_once(found, expected, terms)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, blocks = make(5, 3, 16, torch.float32)
    taken = acceleration.load("block_kernels")
    assert taken is block_kernels
    acceleration.load.cache_clear()
    try:
        monkeypatch.setitem(sys.modules, "isotune.algebra.block_kernels", None)
        monkeypatch.delattr("isotune.algebra.block_kernels")
        assert acceleration.load("block_kernels") is None
        assert_rounded_once(BlockDiagonal(16).apply(x, [blocks]), twin(x, blocks), 16)
    finally:
        acceleration.load.cache_clear()


@on_gpu
def test_captured_in_a_graph_without_a_wait() -> None:
    x, gradient, blocks = make(2048, 128, 32, torch.bfloat16)
    factor = BlockDiagonal(32)

    def both() -> tuple[Tensor, ...]:
        grad_x, grads = factor.backward(x, gradient, [blocks], needs_x=True)
        return factor.apply(x, [blocks]), grad_x, *grads

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for found, expected in zip(captured, both(), strict=True):
        assert torch.equal(found, expected)


@on_gpu
def test_compiled_whole() -> None:
    x, gradient, blocks = make(100, 6, 16, torch.float32)
    x.requires_grad_()
    blocks.requires_grad_()
    with torch.enable_grad():
        compiled = torch.compile(lambda x, d: apply_chain(x, (BlockDiagonal(16),), [d]), fullgraph=True)
        y = compiled(x, blocks)
        found = torch.autograd.grad(y, (x, blocks), gradient)
    torch.testing.assert_close(y.double(), twin(x, blocks), rtol=1e-5, atol=1e-5)
    for one, other in zip(found, twin_gradients(x, gradient, blocks), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
