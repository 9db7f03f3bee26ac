"""PESO: the framework beside a plain reconstruction of it, its start, its scale, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import layers_of, only, trainable
from isotune import PesoConfig, get_peft_model
from isotune.moving import MovingSchedule

RANK, EVERY, STEPS, SCALE = 3, 4, 13, 2.0


def base_of() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(12, 20).double(), nn.Tanh(), nn.Linear(20, 8).double())


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_it_starts_on_the_strongest_directions_as_a_lora() -> None:
    layer, x = nn.Linear(12, 20), torch.randn(4, 12)
    model = get_peft_model(nn.Sequential(layer), PesoConfig(r=RANK, lora_alpha=6.0, target_modules=["0"]))
    adapter = only(model).adapter("default")
    right = torch.linalg.svd(layer.weight.detach()).Vh[:RANK]
    a = adapter.lora_A.detach()
    torch.testing.assert_close(torch.linalg.svdvals(a @ right.T), torch.ones(RANK), rtol=0, atol=1e-5)
    assert not adapter.lora_B.any()
    assert adapter.is_identity()
    assert torch.equal(model(x), layer(x))
    with torch.no_grad():
        adapter.lora_B.normal_()
    assert not adapter.is_identity()
    change = 2.0 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(model(x), layer(x) + x @ change.T, rtol=1e-5, atol=1e-5)


class Anchored(nn.Module):
    """A linear layer as the paper has it: an anchored weight, and factors that are folded into it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.anchor, self.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias.detach().clone()
        self.a = nn.Parameter(torch.zeros(RANK, layer.in_features).double())
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK).double())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.anchor + SCALE * self.b @ self.a, self.bias)

    @torch.no_grad()
    def fold(self) -> None:
        self.anchor += SCALE * self.b @ self.a
        self.b.zero_()


def carried(optimizer: torch.optim.Optimizer, layer: Anchored, a: Tensor) -> None:
    """The moments of B through A' = C A + a rest, and of those of A, whose gradient is 0 at B = 0, the mean square."""
    found = torch.linalg.lstsq(a.T, layer.a.detach().T).solution.T  # C
    rest = (layer.a.detach() - found @ a).square().sum(1) / a.square().sum(1).mean()
    of_a, of_b = optimizer.state[layer.a], optimizer.state[layer.b]
    of_a["exp_avg"] = torch.zeros_like(of_a["exp_avg"])
    of_a["exp_avg_sq"] = of_a["exp_avg_sq"].mean().expand_as(of_a["exp_avg_sq"]).clone()
    of_b["exp_avg"] = of_b["exp_avg"] @ found.T
    of_b["exp_avg_sq"] = of_b["exp_avg_sq"] @ found.T.square() + rest * of_b["exp_avg_sq"].mean()


@pytest.mark.parametrize("select", ["gradient", "warm"])
@pytest.mark.parametrize("treatment", ["reset", "project"])
def test_training_is_that_of_the_framework(select: Any, treatment: Any) -> None:
    """PESO-LoRA-R, restarted along the full gradient before the first step and every few, and warm starts."""
    base = base_of()
    x, y = torch.randn(40, 12).double(), torch.randn(40, 8).double()
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    config = PesoConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["0", "2"])
    model = get_peft_model(copy.deepcopy(base), config)
    twin = nn.Sequential(Anchored(base[0]), nn.Tanh(), Anchored(base[2]))
    factors = [p for own in (twin[0], twin[2]) for p in (own.a, own.b)]
    optimizer, plain = (
        torch.optim.AdamW(p, lr=0.01, weight_decay=0.1) for p in (list(trainable(model).values()), factors)
    )
    restarts = select == "gradient"
    given = {"batches": batches, "loss": loss} if restarts else {}
    schedule = MovingSchedule(EVERY, select=select, optimizer_state=treatment, at_start=restarts, **given)

    def restart(start: bool = False) -> None:
        if restarts or start:
            twin.zero_grad()
            sum(loss(twin, batch) for batch in batches).backward()
        for layer, own in zip((twin[0], twin[2]), layers_of(model), strict=True):
            before = layer.a.detach().clone()
            if restarts:
                following = torch.linalg.svd(layer.anchor.grad).Vh[:RANK]
            elif start:
                following = own.adapter("default").lora_A.detach().clone()
            else:
                values, vectors = torch.linalg.eigh(before @ before.T)
                following = (vectors / values.sqrt()) @ vectors.T @ before
            layer.fold()
            with torch.no_grad():
                layer.a.copy_(following)
            if not start and treatment == "project":
                carried(plain, layer, before)
            elif not start:
                plain.state.pop(layer.a), plain.state.pop(layer.b)
        twin.zero_grad()

    restart(start=True)
    if restarts:
        schedule.step(model, optimizer, done=0)
    for step in range(1, STEPS):
        for one, own in ((model, optimizer), (twin, plain)):
            own.zero_grad()
            loss(one, (x, y)).backward()
            own.step()
        schedule.step(model, optimizer)
        if step % EVERY == 0:
            restart()
        for layer, other in zip(layers_of(model), (twin[0], twin[2]), strict=True):
            adapter = layer.adapter("default")
            torch.testing.assert_close(adapter.lora_A.abs(), other.a.abs(), rtol=1e-4, atol=1e-5)
            whole = layer.base_weight + layer.get_delta_weight("default")
            torch.testing.assert_close(whole, other.anchor + SCALE * other.b @ other.a, rtol=1e-5, atol=1e-5)
    assert [move.number for move in schedule.history] == [0, 1, 2, 3][not restarts :]
    for layer, linear in zip(layers_of(model), (base[0], base[2]), strict=True):
        assert torch.equal(layer.base_weight, linear.weight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"basis": "pinned"}, "basis='pinned' is not allowed with PesoConfig"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0"),
        ({"rank_budget": 1000}, "rank_budget=1000 has no meaning with PesoConfig"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PesoConfig(**options)
