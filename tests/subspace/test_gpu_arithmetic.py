"""What the solvers do on a GPU, done on the CPU: no float64 but in small matrices, TF32 or not, and little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_solvers import assert_orthonormal, sine, with_spectrum
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isotune.subspace import iteration, precision, solvers
from isotune.subspace.pinning import gaussian
from isotune.subspace.precision import exact_product
from isotune.subspace.solvers import cheaper_solver, principal_subspace, principal_subspaces, worth_hashing

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (precision, iteration):
        monkeypatch.setattr(module, "spares_float64", lambda device: True)


class Tf32(TorchDispatchMode):
    """Products of float32 matrices as tensor cores take them: 11 digits of each factor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            args = tuple(map(eleven_digits, args))
        return func(*args, **(kwargs or {}))


def eleven_digits(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    fraction, exponent = torch.frexp(value)
    return torch.ldexp((fraction * 2**11).round(), exponent - 11)


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if not request.param:
        yield False
        return
    monkeypatch.setattr(precision, "reduces_float32", lambda device="cpu": True)
    with Tf32():
        yield True


class Tensors(TorchDispatchMode):
    """The largest float64 tensor that was made inside, and the most bytes that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.float64 = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in given:
                self._alive[reference.cdata] = reference, storage.nbytes()
            if tensor.dtype == torch.float64:
                self.float64 = max(self.float64, tensor.numel())
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return found


@pytest.mark.covered(shape=((240, 700),), tolerance=(1e-4,))
@pytest.mark.parametrize("decay", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(320, 300), (240, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.slow
def test_the_tolerance_is_met(
    decay: float, shape: tuple[int, int], dtype: torch.dtype, tolerance: float, tf32: bool
) -> None:
    spectrum = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    weight = with_spectrum(*shape, spectrum)[0].to(dtype)
    with torch.utils._python_dispatch._disable_current_modes():
        true = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (4, 16):
        found = principal_subspace(weight, rank, solver="lowrank", tolerance=tolerance)
        assert found.solver == "lowrank"
        assert_orthonormal(found.basis, 2e-6)
        assert sine(found.basis, true.Vh[:rank]) <= tolerance
        assert torch.allclose(found.singular_values.double(), true.S[:rank], rtol=max(1e-5, tolerance**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_in_bfloat16_end_in_the_same_subspace(
    dtype: torch.dtype, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iteration, "_rounds_cheaply", lambda matrix, block: True)
    weight = with_spectrum(240, 700, torch.arange(1, 241, dtype=torch.float64) ** -0.5)[0].to(dtype)
    for scale in (1.0, 2.0**-30):
        found = principal_subspace(weight * scale, 16, solver="lowrank", tolerance=1e-4)
        assert found.solver == "lowrank"
        assert sine(found.basis, principal_subspace(weight, 16, solver="full").basis) <= 1e-4


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("shape", [(50, 3000, 20), (3, 40, 60, 8)])
def test_products_are_exact_in_parts(narrow: bool, shape: tuple[int, ...], tf32: bool) -> None:
    *batch, out, width, columns = shape
    left, right = torch.randn(*batch, out, width), torch.randn(*batch, width, columns)
    left = left.bfloat16().float() if narrow else left
    with torch.utils._python_dispatch._disable_current_modes():
        true = left.double() @ right.double()
    error = (exact_product(left, right, narrow=narrow) - true).norm() / true.norm()
    assert float(error) < 3e-7
    if tf32:
        assert float((left @ right - true).norm() / true.norm()) > 1e-4  # what the parts are for


@pytest.mark.covered(shape=((2048, 512),))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2048, 512), (512, 2048)])
@pytest.mark.slow
def test_no_large_float64_and_little_memory(shape: tuple[int, int], dtype: torch.dtype, tf32: bool) -> None:
    weight = with_spectrum(*shape, torch.arange(1, 513, dtype=torch.float64) ** -0.5)[0].to(dtype)
    block = iteration.block_size(16)
    gaussian(512, block, 0)  # made on the CPU, once for all weights
    with Tensors() as counted:
        assert principal_subspace(weight, 16, solver="lowrank").solver == "lowrank"
    assert counted.float64 <= max(block**2, max(shape))
    # A float32 copy of a narrow weight, or with TF32 the parts of a float32 weight, of 1024 columns at a time.
    copies = 4 * weight.numel() * (0 if dtype == torch.float32 else 1)
    parts = 5 * 4 * weight.numel() if tf32 and dtype == torch.float32 else 0
    assert counted.peak <= copies + parts + 16 * 4 * max(shape) * block


@pytest.mark.parametrize("shape", [(700, 90), (90, 700)])
def test_the_exact_solver_widens_a_part_at_a_time(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_spectrum(*shape, torch.arange(1, 91, dtype=torch.float64) ** -0.5)[0].float()
    whole = principal_subspace(weight, 9, solver="full")
    monkeypatch.setattr("isotune.subspace.precision._CHUNK", 90 * 100)
    with Tensors() as counted:
        found = principal_subspace(weight, 9, solver="full")
    assert counted.float64 <= 90 * 100
    assert sine(found.basis, whole.basis) < 1e-6


def test_auto_keeps_large_weights_from_float64() -> None:
    for rank, out, width, solver in (
        (46, 1024, 4096, "full"),
        (352, 1024, 4096, "full"),
        (46, 4096, 4096, "lowrank"),
        (352, 14336, 4096, "lowrank"),
        (352, 4096, 14336, "lowrank"),
        (3000, 4096, 4096, "full"),
    ):
        assert cheaper_solver(out, width, rank, "cuda") == solver


def test_a_weight_on_a_gpu_is_not_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert not worth_hashing(torch.device("cuda", 0))
    assert worth_hashing(torch.device("cpu"))

    def refuse(*_: Any) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr(solvers, "subspace_key", refuse)
    requests = [solvers.SubspaceRequest(torch.eye(5), 2)] * 2
    principal_subspaces(requests)
    cache = solvers.SubspaceCache(tmp_path)
    monkeypatch.setattr(solvers, "worth_hashing", lambda device: False)
    principal_subspaces(requests, cache=cache)
    assert not list(tmp_path.iterdir())
