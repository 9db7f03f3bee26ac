"""The solvers are as exact as ever under each of torch's settings of float32 products, and touch none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isotune.subspace.precision import exact_product, full_precision, reduces_float32
from isotune.subspace.solvers import principal_subspace

backends = torch.backends
NEW = hasattr(backends, "fp32_precision")


def legacy(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def allow_tf32() -> None:
    backends.cuda.matmul.allow_tf32 = True


def attribute(owner: str, value: str) -> Callable[[], None]:
    def set_it() -> None:
        found = backends
        for part in filter(None, owner.split(".")):
            found = getattr(found, part)
        found.fp32_precision = value

    return set_it


def both(*setters: Callable[[], None]) -> Callable[[], None]:
    def set_all() -> None:
        for setter in setters:
            setter()

    return set_all


SETTINGS = {
    "legacy highest": legacy("highest"),
    "legacy high": legacy("high"),
    "legacy medium": legacy("medium"),
    "allow_tf32": allow_tf32,
}
if NEW:
    SETTINGS |= {
        f"{owner or 'backends'} {value}": attribute(owner, value)
        for owner, values in {
            "": ("tf32", "bf16", "ieee"),
            "cuda.matmul": ("tf32", "ieee"),
            "mkldnn.matmul": ("tf32", "bf16", "ieee"),
            "cudnn": ("tf32",),
        }.items()
        for value in values
    }
    SETTINGS |= {
        "legacy medium, then backends tf32": both(legacy("medium"), attribute("", "tf32")),
        "backends bf16, then legacy high": both(attribute("", "bf16"), legacy("high")),
        "legacy medium, then mkldnn.matmul ieee": both(legacy("medium"), attribute("mkldnn.matmul", "ieee")),
    }


def snapshot() -> list[str]:
    def legacy_value() -> str:
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            return "raises"

    values = [legacy_value()]
    if NEW:
        owners = (backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul, backends.cudnn)
        values += [owner.fp32_precision for owner in owners]
    return values


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    if NEW:
        for owner in ("", "cudnn", "cuda.matmul", "mkldnn.matmul"):
            attribute(owner, "none")()
    torch.set_float32_matmul_precision("highest")


def weight_of(out: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(out, 64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(width, 64, generator=generator)).Q
    return left * torch.arange(1, 65) ** -0.5 @ right.T


@pytest.mark.parametrize("solver", ["full", "lowrank"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_solved_as_without_and_left_as_found(setting: str, solver: str) -> None:
    weight = weight_of(300, 400)
    expected = principal_subspace(weight, 8, solver=solver, tolerance=1e-4)
    SETTINGS[setting]()
    before = snapshot()
    found = principal_subspace(weight, 8, solver=solver, tolerance=1e-4)
    assert found.solver == solver
    assert found.basis.dtype == torch.float32
    cosines = torch.linalg.svdvals(found.basis.double() @ expected.basis.double().T)
    assert float(1 - cosines.min() ** 2) ** 0.5 < 3e-4
    assert torch.allclose(found.singular_values, expected.singular_values, rtol=1e-5)
    gram = found.basis.double() @ found.basis.double().T
    assert float((gram - torch.eye(8, dtype=torch.float64)).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="NaN or infinity"):
        principal_subspace(torch.full((20, 20), torch.nan), 2, solver=solver)
    assert snapshot() == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact(setting: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(256, 256, generator=generator), torch.randn(256, 64, generator=generator)
    true = left.double() @ right.double()
    SETTINGS[setting]()
    reduced = reduces_float32("cpu")
    product = exact_product(left, right)
    assert product.dtype == torch.float32
    assert float((product - true).norm() / true.norm()) < 1e-6
    assert full_precision(left).dtype == (torch.float64 if reduced else torch.float32)
    if not reduced:
        assert float(((left @ right) - true).norm() / true.norm()) < 1e-6
    assert full_precision(left.double()).dtype == torch.float64
    assert full_precision(left.bfloat16()).dtype == torch.bfloat16


def test_a_large_product_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotune.subspace.precision._CHUNK", 100)
    torch.set_float32_matmul_precision("medium")
    left, right = torch.randn(31, 40), torch.randn(40, 3)
    true = left.double() @ right.double()
    assert torch.equal(exact_product(left, right), true.float())
    assert exact_product(torch.randn(0, 40), right).shape == (0, 3)


@pytest.mark.parametrize("experts", [(2,), (7,), (2, 3)])
def test_a_stack_is_widened_in_parts(experts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """More experts than a part has rows, and no part larger than that of one matrix."""
    monkeypatch.setattr("isotune.subspace.precision._CHUNK", 100)
    torch.set_float32_matmul_precision("medium")
    left, right = torch.randn(*experts, 31, 40), torch.randn(*experts, 40, 3)
    true = left.double() @ right.double()
    with Products() as products:
        found = exact_product(left, right)
    assert found.dtype == torch.float32
    assert torch.allclose(found, true.float(), rtol=1e-6, atol=1e-7)
    assert products.dtypes == {torch.float64}
    assert products.largest <= max(2 * 40, 40 * 3)


class Products(TorchDispatchMode):
    """The dtypes of all matrix products inside, and the elements of the largest factor."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.mv):
            factors = [value for value in args if isinstance(value, torch.Tensor)]
            self.dtypes |= {factor.dtype for factor in factors}
            self.largest = max(self.largest, *(factor.numel() for factor in factors))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["full", "lowrank"])
def test_no_product_is_left_to_a_setting_that_rounds(solver: str) -> None:
    """Whether a processor rounds is its own affair, so what is looked at is the products that it is given."""
    weight = weight_of(300, 400)
    with Products() as plain:
        principal_subspace(weight, 8, solver=solver)
    torch.set_float32_matmul_precision("medium")
    with Products() as careful:
        principal_subspace(weight, 8, solver=solver)
        exact_product(weight, weight.T)
    assert (torch.float32 in plain.dtypes) == (solver == "lowrank")
    assert careful.dtypes == {torch.float64}
