"""What the tests of the rotating methods share: parameter values of any kind, twins, and models that show M itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from isotune import get_peft_model
from isotune.adapter.rotation import RotationAdapter
from isotune.algebra.factors import apply_chain, transpose_chain

KINDS = ("uniform", "equal", "sparse", "signs")


def rotated(operator: RotationAdapter, x: Tensor) -> Tensor:
    """x M."""
    return apply_chain(x, operator.chain, operator.chain_tensors(x.dtype))


def transposed(operator: RotationAdapter, x: Tensor) -> Tensor:
    """x Mᵀ: the rows of a weight W become those of W Mᵀ."""
    return apply_chain(x, *transpose_chain(operator.chain, operator.chain_tensors(x.dtype)))


def fill(operator: RotationAdapter, kind: str, magnitude: float, seed: int) -> None:
    """Set every parameter but the gain to entries of at most `magnitude`.

    "equal" and "signs" have every entry at the bound: the largest generators, and for HRA directions that are all
    parallel; "sparse" gives zero rows and blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in operator.named_parameters():
            if name == "output_gain":
                continue
            uniform = magnitude * (2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1)
            if kind == "equal":
                uniform.fill_(magnitude)
            elif kind == "sparse":
                uniform *= torch.rand(parameter.shape, generator=generator) < 0.1
            elif kind == "signs":
                uniform = magnitude * torch.where(uniform < 0, -1.0, 1.0).double()
            parameter.copy_(uniform.clamp(-magnitude, magnitude))


def fillings(largest: float = 10.0) -> st.SearchStrategy[tuple[str, float, int]]:
    """The arguments of `fill`, with entries of all orders of magnitude up to `largest`."""
    magnitudes = st.one_of(st.floats(1e-6, largest), st.floats(0.5 * largest, largest))
    return st.tuples(st.sampled_from(KINDS), magnitudes, st.integers(0, 2**20))


def orthogonality_error(matrix: Tensor) -> float:
    """The largest entry of Mᵀ M − I, computed in float64 so that only the error of M itself is seen."""
    matrix = matrix.detach().double()
    return float((matrix.mT @ matrix - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


def assert_orthogonal(operator: RotationAdapter, tolerance: float = 1e-5) -> None:
    """M is orthogonal, and it and its transpose keep the norms of inputs."""
    assert operator.orthogonal
    matrix = operator.matrix().detach()
    assert matrix.dtype == torch.float32
    error = orthogonality_error(matrix)
    assert error <= tolerance, error
    x = torch.randn(7, operator.size)
    norms = x.double().norm(dim=1)
    for y in (rotated(operator, x), transposed(operator, x)):
        assert float((y.detach().double().norm(dim=1) / norms - 1).abs().max()) <= tolerance


def assert_is(operator: RotationAdapter, definition: Callable[[], Tensor]) -> None:
    """The operator, in float64, is the map by the definition: values and gradients, both ways.

    Args:
        operator: with any parameters.
        definition: M, (n, n), as a differentiable function of the operator's parameters.
    """
    parameters = [p for name, p in operator.named_parameters() if name != "output_gain"]
    expected = definition()
    x = torch.randn(3, 2, operator.size, dtype=torch.float64, requires_grad=True)
    close = {"rtol": 1e-9, "atol": 1e-10}
    for ours, theirs in (
        (operator.matrix(), expected),
        (rotated(operator, x), x @ expected),
        (transposed(operator, x), x @ expected.T),
    ):
        torch.testing.assert_close(ours, theirs, **close)
        cotangent = torch.randn_like(theirs)
        sources = parameters if ours.ndim == 2 else [*parameters, x]
        found = torch.autograd.grad(ours, sources, cotangent)
        wanted = torch.autograd.grad(theirs, sources, cotangent, retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, **close)


def assert_penalty_is(operator: RotationAdapter, expected: Tensor) -> None:
    """The operator's penalty has this value, and its gradient, which is not zero."""
    (parameter,), penalty = operator.parameters(), operator.penalty()
    torch.testing.assert_close(penalty, expected)
    found, wanted = (torch.autograd.grad(value, parameter)[0] for value in (penalty, expected))
    torch.testing.assert_close(found, wanted)
    assert bool(found.any())


def skew(entries: Tensor, size: int) -> Tensor:
    """Q with these entries above the diagonal, row by row, and their negatives below."""
    rows = []
    for i in range(size):
        row = []
        for j in range(size):
            low, high = min(i, j), max(i, j)
            place = low * size - low * (low + 1) // 2 + high - low - 1
            row.append(torch.zeros_like(entries[0]) if i == j else entries[place] * (1 if i < j else -1))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def cayley(entries: Tensor, size: int) -> Tensor:
    """(I + Q)(I − Q)⁻¹ with a plain inverse."""
    generator, eye = skew(entries, size), torch.eye(size, dtype=entries.dtype)
    return (eye + generator) @ torch.linalg.inv(eye - generator)


class Bare(nn.Module):
    """Layers of one width side by side, whose weights are the identity: on the rows of I each gives its own M."""

    def __init__(self, width: int, layers: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers))
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def bare(config: Any, width: int, layers: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """An adapted `Bare` model in evaluation mode."""
    config.target_modules = {f"layers.{i}" for i in range(layers)}
    return get_peft_model(Bare(width, layers, dtype), config).eval()


def maps_of(model: Any, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(layers, width, width): what one forward pass does to the unit vectors, by rows."""
    result: Tensor = model(torch.eye(width, dtype=dtype))
    return result


def diagonal_blocks(maps: Tensor, size: int) -> Tensor:
    """(..., n, n) -> (..., n / size, size, size)."""
    grid = maps.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return grid.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
