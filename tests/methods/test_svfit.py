"""SVFit against its paper: scaled singular values, which directions, training, and finding the basis again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import Stack, adapt, assert_all_differ, down_of, layers_of, only, relative_error, trainable
from isotune import SvfitConfig, get_peft_model
from isotune.errors import BaseMismatchError
from isotune.subspace.selection import chosen

TARGETS = ["first", "second", "third"]
SELECTIONS = ("top", "bottom", "mixed")


class Scaled(nn.Module):
    """y = U diag(σ (1 + d)) Vᵀ x with d on some of all singular triplets, by torch's own decomposition."""

    def __init__(self, weight: Tensor, places: Tensor) -> None:
        super().__init__()
        self.left, self.values, self.right = torch.linalg.svd(weight, full_matrices=False)
        self.places, self.stretch = places, nn.Parameter(torch.zeros(len(places), dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.ones_like(self.values).index_add(0, self.places, self.stretch)
        return x @ self.right.T * (self.values * factors) @ self.left.T


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_training_scales_the_chosen_singular_values(selection: Any, shape: tuple[int, int]) -> None:
    layer = nn.Linear(*shape, bias=False, dtype=torch.float64)
    twin = Scaled(layer.weight.detach().clone(), chosen(12, 5, selection))
    config = SvfitConfig(r=5, selection=selection, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    x, target = torch.randn(30, shape[0], dtype=torch.float64), torch.randn(30, shape[1], dtype=torch.float64)
    outputs = []
    for trained in (model, twin):
        optimizer = torch.optim.Adam(trainable(trained).values(), lr=5e-3)
        for _ in range(10):
            (trained(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(trained(x))
    torch.testing.assert_close(*outputs)
    stretch = only(model).adapter("default").stretch.detach().double()
    torch.testing.assert_close(stretch, twin.stretch.detach())
    assert float(stretch.abs().min()) > 1e-3
    merged = torch.linalg.svdvals(model.merge_and_unload()[0].weight)
    torch.testing.assert_close(merged, (twin.values.index_add(0, twin.places, twin.values[twin.places] * stretch))
                               .sort(descending=True).values)  # fmt: skip


KNOBS: list[dict[str, Any]] = [
    {"r": 7},
    {"selection": "bottom"},
    {"selection": "mixed"},
    {"rank_pattern": {"second": 4}},
    {"init_weights": True},
]


def test_every_knob_changes_the_output() -> None:
    x, outputs = torch.randn(4, 24), {}
    for knob in [{}, *KNOBS]:
        torch.manual_seed(0)
        base = Stack()
        torch.manual_seed(1)
        options = {"r": 8, "init_weights": False, "target_modules": ["second"], **knob}
        outputs[str(knob)] = adapt(base, SvfitConfig(**options))(x).detach()
    assert_all_differ(outputs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"selection": "band"}, "selection='band'"),
        ({"alpha_pattern": {"q_proj": 2.0}}, "alpha_pattern.*no meaning with SvfitConfig"),
        ({"r": 0}, "r=0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SvfitConfig(**options)


def stack(seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack()


@pytest.mark.parametrize("basis", ["pinned", "embedded"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_saved_adapter_is_the_same_function(selection: Any, basis: Any, tmp_path: Path) -> None:
    config = SvfitConfig(r=6, selection=selection, basis=basis, target_modules=TARGETS, init_weights=False)
    model, x = adapt(stack(), config), torch.randn(5, 24)
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stack(), tmp_path).eval()
    assert relative_error(loaded(x), expected) < 1e-5
    if basis == "pinned":
        with pytest.raises(BaseMismatchError, match="not trained on this base"):
            PeftModel.from_pretrained(stack(1), tmp_path)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_pinned_directions_are_found_among_those_of_another_decomposition(
    selection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other signs and neighbours exchanged, as another solver may give them."""
    from isotune.tuner import placing

    config = SvfitConfig(r=6, selection=selection, target_modules=TARGETS, init_weights=False)
    model = adapt(stack(), config)
    model.save_pretrained(tmp_path)
    solved = placing.principal_subspaces

    def other(*args: Any, **options: Any) -> Any:
        found = solved(*args, **options)
        for one in found:
            one.basis[[0, 1, -2, -1]] = one.basis[[1, 0, -1, -2]] * -1
        return found

    monkeypatch.setattr(placing, "principal_subspaces", other)
    loaded = PeftModel.from_pretrained(stack(), tmp_path, subspace_cache=False)
    for own, back in zip(layers_of(model), layers_of(loaded), strict=True):
        assert relative_error(down_of(back), down_of(own)) < 1e-5


def test_adapters_share_a_basis_only_of_the_same_selection() -> None:
    model = adapt(stack(), SvfitConfig(r=6, target_modules=["second"]))
    model.add_adapter("same", SvfitConfig(r=6, target_modules=["second"]))
    model.add_adapter("other", SvfitConfig(r=6, selection="bottom", target_modules=["second"]))
    layer = only(model)
    assert layer.subspace("same").placement.down is layer.subspace("default").placement.down
    assert float((down_of(layer, "other") @ down_of(layer).T).abs().max()) < 1e-5


@pytest.mark.parametrize("selection", ["bottom", "mixed"])
def test_other_directions_are_solved_once_for_equal_weights_and_cached(
    selection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isotune.subspace import solvers

    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path))
    solved, calls = solvers.subspace_at, []
    monkeypatch.setattr(solvers, "subspace_at", lambda *args, **options: (calls.append(1), solved(*args, **options))[1])

    def bases() -> list[Tensor]:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        base[1].load_state_dict(base[0].state_dict())
        model = adapt(base, SvfitConfig(r=3, selection=selection, target_modules=["0", "1"]))
        return [down_of(layer) for layer in layers_of(model)]

    first, second = bases()
    assert len(calls) == 1
    assert torch.equal(first, second)
    assert all(torch.equal(again, first) for again in bases())
    assert len(calls) == 1
