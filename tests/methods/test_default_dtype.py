"""What an adapter stores does not depend on torch's default dtype, under which models are built in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from isotune.methods import METHODS
from isotune.subspace.pinning import pin, recover
from isotune.subspace.solvers import principal_subspace

OPTIONS = {"psoft": {"r": 4}, "lora_xs": {"r": 4}, "hra": {"r": 4}, "oft": {"oft_block_size": 4}}


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def _default(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_float32(method: str) -> None:
    operator = METHODS[method](**OPTIONS.get(method, {})).build_operator("layer", 16, 12)
    assert {parameter.dtype for parameter in operator.parameters()} == {torch.float32}


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e20])
def test_subspaces_and_pins_are_the_same_to_the_bit(scale: float) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * scale
    expected = principal_subspace(weight, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = principal_subspace(weight, 4)
            sketch = pin(found.basis)
            recovered, residual = recover(sketch, found.basis)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found.basis, expected.basis)
        assert torch.equal(found.singular_values, expected.singular_values)
        assert torch.equal(sketch, pin(expected.basis))
        assert sketch.dtype == recovered.dtype == torch.float32
        assert residual < 1e-5
