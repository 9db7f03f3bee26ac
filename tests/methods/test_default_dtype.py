"""What an adapter stores does not depend on torch's default dtype, under which models are built in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers import EVERY_METHOD, HOSTS_OF_12, SUBSPACES, as_trained, only, relative_error, seeded_host
from isotune.methods import METHODS
from isotune.subspace.pinning import pin, recover
from isotune.subspace.solvers import principal_subspace

OPTIONS = {
    "psoft": {"r": 4},
    "lora_xs": {"r": 4},
    "svfit": {"r": 4},
    "cersa": {"r": 4},
    "hra": {"r": 4},
    "oft": {"oft_block_size": 4},
    "road": {"group_size": 4},
    "oplora": {"preserved_rank": 4},
}


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def _default(request: pytest.FixtureRequest) -> Iterator[None]:
    with default(request.param):
        yield


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
        with default(dtype):
            found = principal_subspace(weight, 4)
            sketch = pin(found.basis)
            recovered, residual = recover(sketch, found.basis)
        assert torch.equal(found.basis, expected.basis)
        assert torch.equal(found.singular_values, expected.singular_values)
        assert torch.equal(sketch, pin(expected.basis))
        assert sketch.dtype == recovered.dtype == torch.float32
        assert residual < 1e-5


CASES = [(method, {}) for method in EVERY_METHOD] + [(method, {"basis": "embedded"}) for method in SUBSPACES]


@pytest.mark.covered
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_an_adapter_made_saved_and_loaded_under_bfloat16(
    method: str, options: dict[str, Any], host: str, base: torch.dtype, tmp_path: Path
) -> None:
    """As scripts do that build their model in half precision, or load it in full, under this default."""
    x = HOSTS_OF_12[host][1]()
    x = x.to(base) if x.is_floating_point() else x
    plain = [seeded_host(host).to(base) for _ in range(3)]
    with default(torch.bfloat16):
        model = as_trained(method, plain[0], "layer", **options)
        expected = model(x)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(plain[1], tmp_path).eval()
        found = loaded(x)
    later = PeftModel.from_pretrained(plain[2], tmp_path).eval()
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    for each in (model, loaded, later):
        layer = only(each)
        own = [*layer.adapter("default").parameters(), *(basis.stored for basis in layer.bases("default"))]
        assert {tensor.dtype for tensor in own} == {torch.float32}
        assert relative_error(each(x), expected) < 1e-5
    assert found.dtype == expected.dtype == base
    assert relative_error(found, expected) < 1e-5
    assert relative_error(only(model).get_base_layer()(x), expected) > 1e-2
