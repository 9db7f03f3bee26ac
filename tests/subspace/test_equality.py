"""Equal weights are recognised by their bits, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from isotune.subspace import solvers
from isotune.subspace.equality import checksum
from isotune.subspace.result import SubspaceRequest
from isotune.subspace.solvers import principal_subspaces


@pytest.fixture(autouse=True)
def _nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("hashed without a cache")

    monkeypatch.setattr(solvers, "subspace_key", refuse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_one_checksum_are_compared(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 30).to(dtype)
    permuted = weight.flip(0)
    assert checksum(weight) == checksum(permuted)
    found = principal_subspaces([SubspaceRequest(w, 3) for w in (weight, permuted, weight.clone(), permuted.clone())])
    assert found[0] is found[2]
    assert found[1] is found[3]
    assert found[0] is not found[1]


def test_made_weights_are_compared_too() -> None:
    def make(seed: int, flipped: bool) -> torch.Tensor:
        weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
        return weight.flip(0) if flipped else weight

    requests = [
        SubspaceRequest(lambda s=s, f=f: make(s, f), 3) for s, f in ((0, False), (0, True), (0, False), (1, False))
    ]
    found = principal_subspaces([*requests, SubspaceRequest(make(0, True), 3)])
    assert found[0] is found[2]
    assert found[1] is found[4]
    assert len({id(one) for one in found}) == 3


def test_a_checksum_is_of_the_bits_whatever_the_layout_and_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(31, 17)
    expected = sum(weight.view(torch.int32).flatten().tolist())
    monkeypatch.setattr("isotune.subspace.precision._CHUNK", 40)
    for layout in (
        weight,
        weight.T.contiguous().T,
        torch.zeros(62, 34)[::2, ::2].copy_(weight),
        torch.nn.Parameter(weight),
    ):
        assert checksum(layout) == expected
    assert checksum(torch.tensor([[0.0]])) != checksum(torch.tensor([[-0.0]]))
