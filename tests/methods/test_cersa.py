"""CERSA against its paper: the core between singular vectors, the same steps, ranks by energy, and what is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import down_of, only, relative_error, tiny_gpt2, trainable, up_of
from isotune import CersaConfig, get_peft_model
from isotune.subspace.energy import kept_shares


class Paper(nn.Module):
    """y = (W − U_k S_k V_kᵀ) x + U_k K V_kᵀ x: the paper's layer with what it discards; K = S_k at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self.values, self.left, self.right = values[:rank], left[:, :rank], right[:rank]
        self.rest = weight - (self.left * self.values) @ self.right
        self.core = nn.Parameter(torch.diag(self.values))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rest.T + x @ self.right.T @ self.core.T @ self.left.T


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_training_is_the_paper_s(shape: tuple[int, int], optimizer: str) -> None:
    """The same core after twenty steps, up to the signs of the singular vectors, which no optimiser here sees."""
    layer = nn.Linear(*shape, bias=False, dtype=torch.float64)
    twin = Paper(layer.weight.detach().clone(), 5)
    model = get_peft_model(nn.Sequential(layer), CersaConfig(r=5, target_modules=["0"]))
    layer, operator = only(model), only(model).adapter("default")
    signs = torch.sign((down_of(layer) * twin.right).sum(1))
    torch.testing.assert_close(down_of(layer), twin.right * signs[:, None])
    torch.testing.assert_close(up_of(layer), twin.left * signs)
    x, target = torch.randn(30, shape[0], dtype=torch.float64), torch.randn(30, shape[1], dtype=torch.float64)
    outputs = []
    for trained in (model, twin):
        stepping = getattr(torch.optim, optimizer)(trainable(trained).values(), lr=1e-2)
        for _ in range(20):
            (trained(x) - target).square().mean().backward()
            stepping.step()
            stepping.zero_grad()
        outputs.append(trained(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    moved = (twin.core - torch.diag(twin.values)) * signs[:, None] * signs
    torch.testing.assert_close(operator.core, moved, rtol=1e-5, atol=1e-5)
    assert float(moved.abs().max()) > 1e-3


def test_a_step_changes_the_weight_by_the_step_of_the_core() -> None:
    layer = nn.Linear(24, 16)
    model = get_peft_model(nn.Sequential(layer), CersaConfig(r=6, target_modules=["0"]))
    found = only(model)
    core = torch.randn(6, 6)
    with torch.no_grad():
        found.adapter("default").core.copy_(core)
    change = found.get_delta_weight("default")
    left, _, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    signs = torch.sign((down_of(found) * right[:6]).sum(1))
    expected = (left[:, :6] * signs) @ core @ (right[:6] * signs[:, None])
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
    assert float(torch.linalg.norm(change)) == pytest.approx(float(torch.linalg.norm(core)), rel=1e-4)


def test_ranks_are_the_least_that_hold_the_energy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 40))
    with torch.no_grad():
        base[0].weight.mul_(0.7 ** torch.arange(32.0))
    model = get_peft_model(copy.deepcopy(base), CersaConfig(target_modules=["0", "1"]))
    config = model.peft_config["default"]
    for name, layer in base.named_children():
        kept = kept_shares(torch.linalg.svdvals(layer.weight.detach().double()).square())
        rank = config.rank_of(name)
        assert kept[rank - 1] >= 0.95 > kept[rank - 2]
    assert config.rank_of("0") < config.rank_of("1")
    for parameter in trainable(model).values():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], isinstance(stored["r"], int)) == ("ISOTUNE_CERSA", True)
    assert "rank_energy" not in stored
    x = torch.randn(5, 32)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_weight_without_energy_in_some_directions() -> None:
    layer = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        layer.weight[:, 3:] = 0.0
    model = get_peft_model(nn.Sequential(layer), CersaConfig(r=6, target_modules=["0"]))
    x = torch.randn(4, 12)
    torch.testing.assert_close(model(x), model.unload()(x))
    layer = nn.Linear(12, 12, bias=False)
    nn.init.zeros_(layer.weight)
    model = get_peft_model(nn.Sequential(layer), CersaConfig(target_modules=["0"]))
    assert only(model).adapter("default").size == 1
    assert bool(torch.isfinite(model(x)).all())


def of_low_rank() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False)
    layer.weight.data = torch.randn(32, 2) @ torch.randn(2, 32)
    return nn.Sequential(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_no_left_vector_belongs_to_a_singular_value_that_is_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    """U depends on the weight alone: it is the same after a cast, and on a base of another dtype."""
    model = get_peft_model(of_low_rank(), CersaConfig(r=4, target_modules=["0"], basis="embedded"))
    layer = only(model)
    nn.init.normal_(layer.adapter("default").core)
    assert not up_of(layer)[:, 2:4].any()
    torch.testing.assert_close(up_of(layer)[:, :2].norm(dim=0), torch.ones(2))
    before, x = layer.get_delta_weight("default"), torch.randn(5, 32, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(of_low_rank().to(dtype), tmp_path)
    model.to(dtype)
    for cast in (model, loaded):
        cast(x)
        assert relative_error(only(cast).get_delta_weight("default"), before) < 2e-2


def test_embeddings_are_those_of_the_merged_weight() -> None:
    model = get_peft_model(tiny_gpt2(), CersaConfig(r=6, target_modules=["wte"]))
    with torch.no_grad():
        nn.init.normal_(trainable(model)["base_model.model.transformer.wte.isotune_operator.default.core"], 0, 0.5)
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    merged = model.merge_and_unload()(ids).logits
    assert relative_error(merged, expected) < 1e-4


@pytest.mark.parametrize("rank", ["auto", 4])
def test_an_alpha_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"^alpha_pattern=.*no meaning with CersaConfig"):
        CersaConfig(r=rank, alpha_pattern={"0": 8.0})
