"""ROSA: its start on singular triplets, its training beside the published algorithm, ranks as shares, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from helpers import Chain, OneLayer, layers_of, only, relative_error, trainable
from isotune import PesoConfig, RosaConfig, get_peft_model
from isotune.files.export_lora import export_lora
from isotune.moving import MovingSchedule
from isotune.moving.optimiser import Factors, project

SHAPES = [(20, 12), (12, 20)]
RANK = 3


def rosa(*layers: nn.Module, **options: Any) -> Any:
    targets = [str(index) for index in range(len(layers)) if isinstance(layers[index], nn.Linear)]
    return get_peft_model(nn.Sequential(*layers), RosaConfig(**{"r": RANK, "target_modules": targets, **options}))


def triplets(weight: Tensor) -> tuple[Tensor, Tensor]:
    """S Vᵀ (n, in) and U (out, n), of all singular triplets."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return values[:, None] * right, left


def place_of(adapter: Any, weight: Tensor) -> int:
    """The first of the triplets on which an adapter is placed."""
    overlap = (adapter.placement.down[:RANK].double() @ triplets(weight)[0].T).abs()
    return int((overlap / overlap.norm(dim=0)).argmax(1).min())


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sample", ["random", "top", "bottom"])
def test_it_starts_from_neighbouring_triplets(shape: tuple[int, int], sample: str) -> None:
    layer = nn.Linear(*shape[::-1])
    model = rosa(layer, sample_method=sample)
    adapter, first = only(model).adapter("default"), place_of(only(model).adapter("default"), layer.weight.detach())
    assert first == {"top": 0, "bottom": min(shape) - RANK}.get(sample, first)
    down, up = (one.float() for one in triplets(layer.weight.detach()))
    down, up = down[first : first + RANK], up[:, first : first + RANK]
    signs = torch.sign((adapter.lora_B.detach() * up).sum(0))
    torch.testing.assert_close(adapter.lora_A, signs[:, None] * down, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.lora_B, up * signs, rtol=1e-4, atol=1e-5)
    assert adapter.is_identity()
    x = torch.randn(4, shape[1])
    assert torch.equal(model(x), layer(x))
    with torch.no_grad():
        adapter.lora_A.zero_()  # without its part the layer computes with the rest of the weight
    rest = layer.weight.detach() - up @ down
    torch.testing.assert_close(model(x), nn.functional.linear(x, rest, layer.bias), rtol=1e-4, atol=1e-5)


def test_the_first_band_is_drawn_from_the_seed_and_the_name() -> None:
    base = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    places = []
    for seed in (0, 0, 1, 2):
        torch.manual_seed(len(places))  # which must not matter
        model = get_peft_model(copy.deepcopy(base), RosaConfig(r=RANK, basis_seed=seed, target_modules=["0", "1"]))
        places.append([place_of(one.adapter("default"), one.base_weight) for one in layers_of(model)])
    assert places[0] == places[1]
    assert len({tuple(one) for one in places}) == 3
    assert any(first != second for first, second in places)


def test_the_triplets_may_stay_in_the_weight() -> None:
    layer, x = nn.Linear(12, 20), torch.randn(4, 12)
    model = rosa(layer, factorize_method="add", sample_method="top")
    down, up = (one.float() for one in triplets(layer.weight.detach()))
    twice = layer.weight.detach() + up[:, :RANK] @ down[:RANK]
    torch.testing.assert_close(model(x), nn.functional.linear(x, twice, layer.bias), rtol=1e-4, atol=1e-5)
    adapter = only(model).adapter("default")
    assert adapter.is_untrained()
    assert not adapter.is_identity()


def test_a_random_start_needs_no_triplets() -> None:
    model, x = rosa(nn.Linear(12, 20), factorize_method="random"), torch.randn(4, 12)
    adapter = only(model).adapter("default")
    drawn = adapter.lora_B.detach().clone()
    assert not adapter.lora_A.any()
    assert 0.5 < float(drawn.std()) < 1.5
    assert adapter.is_identity()
    again = only(rosa(nn.Linear(12, 20), factorize_method="random")).adapter("default").lora_B
    assert torch.equal(again, drawn)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    expected = model(x).detach()
    MovingSchedule(1, select="band").step(model, optimizer)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not adapter.lora_A.any()
    assert not torch.equal(adapter.lora_B, drawn)


def test_a_weight_of_zeros_can_be_trained() -> None:
    layer, x = nn.Linear(12, 20, bias=False), torch.randn(64, 12)
    nn.init.zeros_(layer.weight)
    model, target = rosa(layer), torch.randn(64, 20)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    before = float((model(x) - target).square().mean())
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    assert float((model(x) - target).square().mean()) < before - 0.01


def test_the_whole_weight_may_be_trained() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(4, 5)
    model = rosa(layer, r=5)
    assert torch.equal(model(x), layer(x))
    with torch.no_grad():
        only(model).adapter("default").lora_B.zero_()
    torch.testing.assert_close(model(x), layer.bias.expand(4, 7), rtol=0, atol=1e-6)


# -- beside the published algorithm ------------------------------------------------------------------------------------


class Twin(nn.Module):
    """A linear layer as the paper has it: W is replaced at each resampling by what is left without the triplets."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.rest, self.bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        self.a, self.b = (nn.Parameter(torch.zeros(0, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.whole(), self.bias)

    def whole(self) -> Tensor:
        return self.rest + self.b @ self.a if self.a.numel() else self.rest

    @torch.no_grad()
    def resample(self, first: int) -> None:
        weight = self.whole()
        down, up = triplets(weight)
        signs = torch.where(torch.rand(RANK) < 0.5, -1.0, 1.0).double()  # which no decomposition fixes
        self.a = nn.Parameter(signs[:, None] * down[first : first + RANK])
        self.b = nn.Parameter(up[:, first : first + RANK] * signs)
        self.rest = weight - self.b @ self.a


def optimiser_of(kind: str, parameters: Any) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("sample", "select"), [("random", "band"), ("top", "top"), ("bottom", "bottom")])
@pytest.mark.parametrize("every", [1, 2])
def test_epochs_are_those_of_the_published_algorithm(kind: str, sample: Any, select: Any, every: int) -> None:
    """New triplets after each epoch, or each second, the moments lost, the rate's schedule kept."""
    torch.manual_seed(4)
    base = nn.Sequential(nn.Linear(12, 20).double(), nn.Tanh(), nn.Linear(20, 8).double())
    x, y = torch.randn(40, 12).double(), torch.randn(40, 8).double()
    model = rosa(*copy.deepcopy(base), sample_method=sample)
    twin = nn.Sequential(Twin(base[0]), nn.Tanh(), Twin(base[2]))
    epochs, batches = 3 if every == 1 else 5, 4
    optimizer = optimiser_of(kind, trainable(model).values())

    def rate(step: int) -> float:
        return 1.0 - step / (epochs * batches)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    schedule = MovingSchedule(every, unit="epoch", select=select)
    step, places = 0, []
    for epoch in range(epochs):
        if epoch % every == 0:
            for layer, other in zip(layers_of(model), (twin[0], twin[2]), strict=True):
                places.append(place_of(layer.adapter("default"), other.whole()))
                other.resample(places[-1])
            plain = optimiser_of(kind, list(twin.parameters()))
            theirs = torch.optim.lr_scheduler.LambdaLR(plain, lambda own, begun=step: rate(begun + own))
        for rows in torch.arange(40).chunk(batches):
            for one, own in ((model, optimizer), (twin, plain)):
                own.zero_grad()
                (one(x[rows]) - y[rows]).square().mean().backward()
                own.step()
            scheduler.step()
            theirs.step()
            step += 1
            for layer, other in zip(layers_of(model), (twin[0], twin[2]), strict=True):
                adapter = layer.adapter("default")
                product = adapter.lora_B @ adapter.lora_A
                torch.testing.assert_close(product, other.b @ other.a, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(adapter.lora_A.abs(), other.a.abs(), rtol=1e-5, atol=1e-5)
                whole = layer.base_weight + layer.get_delta_weight("default")
                torch.testing.assert_close(whole, other.whole(), rtol=1e-5, atol=1e-5)
        schedule.step(model, optimizer)
    assert [move.done for move in schedule.history] == ([1, 2, 3] if every == 1 else [2, 4])
    assert sample != "random" or len(set(places)) > 2
    for layer, linear in zip(layers_of(model), (base[0], base[2]), strict=True):
        assert torch.equal(layer.base_weight, linear.weight)


def test_an_export_to_lora_is_exact(tmp_path: Path) -> None:
    base, x = Chain(), torch.randn(5, 12)
    model = get_peft_model(copy.deepcopy(base), RosaConfig(r=RANK, target_modules=["layers.0", "layers.1"]))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    schedule = MovingSchedule(2, select="band")
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step(model, optimizer)
        optimizer.zero_grad()
    assert set(schedule.history[0].ranks.values()) == {2 * RANK}
    report = export_lora(model, tmp_path)
    assert report.error == 0.0
    assert {layer.rank for layer in report.layers} == {4 * RANK}
    plain = PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(plain(x).detach(), model(x).detach()) < 1e-5


# -- the state of the optimiser ----------------------------------------------------------------------------------------


def test_moments_of_factors_are_those_of_the_same_gradient() -> None:
    """Where the next factors lie in the span of the former ones; the second moments are those of a reordering."""
    torch.manual_seed(3)
    adapter = only(rosa(nn.Linear(12, 20))).adapter("default")
    gradient, a, b = torch.randn(20, 12), torch.randn(RANK, 12), torch.randn(20, RANK)
    mix, other = torch.randn(RANK, RANK), torch.randn(RANK, RANK)
    overlap = Factors.of((a, b.T), (mix @ a, (b @ other).T))
    for name, moment, expected in (
        ("lora_A", b.T @ gradient, (b @ other).T @ gradient),
        ("lora_B", gradient @ a.T, gradient @ (mix @ a).T),
    ):
        found = project(adapter, name, {"exp_avg": moment}, overlap)["exp_avg"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    order = torch.tensor([2, 0, 1])
    overlap = Factors.of((a, b.T), (-a[order], b.T[order]))
    for name, squares, expected in (
        ("lora_A", (b.T @ gradient) ** 2, ((b.T @ gradient) ** 2)[order]),
        ("lora_B", (gradient @ a.T) ** 2, ((gradient @ a.T) ** 2)[:, order]),
    ):
        found = project(adapter, name, {"exp_avg_sq": squares}, overlap)["exp_avg_sq"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_of_a_new_direction_the_mean_is_taken() -> None:
    adapter, eye = only(rosa(nn.Linear(12, 20))).adapter("default"), torch.eye(12)
    after = torch.stack([eye[0], 2 * eye[5], torch.zeros(12)])
    overlap = Factors.of((eye[:RANK], torch.eye(20)[:RANK]), (after, torch.eye(20)[:RANK]))
    squares = torch.rand(20, RANK)
    found = project(adapter, "lora_B", {"exp_avg": squares, "exp_avg_sq": squares}, overlap)
    torch.testing.assert_close(found["exp_avg"], squares * torch.tensor([1.0, 0.0, 0.0]))
    mean = squares.mean().expand(20)
    torch.testing.assert_close(found["exp_avg_sq"], torch.stack([squares[:, 0], 4 * mean, mean], 1))


# -- ranks, files and refusals -----------------------------------------------------------------------------------------


def test_a_share_of_the_rank(tmp_path: Path) -> None:
    config, x = RosaConfig(rank_share=0.2, target_modules=r"layers\.\d"), torch.randn(5, 12)
    model = get_peft_model(Chain(12, 24, 24, 4, 12), config)
    assert [layer.adapter("default").size for layer in layers_of(model)] == [2, 4, 1, 1]  # max(int(share · n), 1)
    assert config.rank_share == 0.2  # the given one makes its own choice for every model
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "rank_share" not in stored
    assert sorted(stored["rank_pattern"].values()) == [1, 1, 2, 4]
    loaded = PeftModel.from_pretrained(Chain(12, 24, 24, 4, 12), tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("change", [1e-3, 1e-2])
def test_an_untrained_adapter_starts_at_a_weight_that_has_changed_little(change: float) -> None:
    """As of a checkpoint of the same base that is loaded afterwards."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 20), torch.randn(4, 12)
    model = rosa(copy.deepcopy(layer), sample_method="top")
    model(x)
    with torch.no_grad():
        layer.weight.add_(torch.randn(20, 12), alpha=change * float(layer.weight.std()))
    only(model).base_layer.load_state_dict(layer.state_dict())
    assert torch.equal(model(x), layer(x))
    assert only(model).adapter("default").is_identity()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    learnt = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    with torch.no_grad():
        only(model).base_weight.mul_(1.0 + change)
    model(x)
    for name, parameter in trainable(model).items():
        assert torch.equal(parameter, learnt[name])  # what has been learnt stays


def test_a_rounded_weight_gives_what_its_file_gives(tmp_path: Path) -> None:
    """In half precision, where other adapters take a weight that has changed by as much as rounding for the same."""
    base, x = Chain(), torch.randn(5, 12).bfloat16()
    options: dict[str, Any] = {"r": RANK, "init_weights": False, "target_modules": ["layers.0", "layers.1"]}
    model = get_peft_model(copy.deepcopy(base), RosaConfig(**options))
    model.to(torch.bfloat16)
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path)
    for layer, other in zip(layers_of(model), layers_of(loaded), strict=True):
        for one, found in zip(
            layer.adapter("default").placement.factors, other.adapter("default").placement.factors, strict=True
        ):
            torch.testing.assert_close(one, found, rtol=1e-5, atol=1e-6)
    assert relative_error(loaded(x).detach(), expected) < 1e-3


@pytest.mark.parametrize("config", [RosaConfig, PesoConfig])
def test_an_adapter_on_the_meta_device_waits_for_its_values(config: Any) -> None:
    """low_cpu_mem_usage: the values come from a file."""
    options, x = {"r": RANK, "target_modules": ["layers.0", "layers.1"]}, torch.randn(4, 12)
    trained = get_peft_model(Chain(), config(init_weights=False, **options))
    model = get_peft_model(Chain(), config(**options), low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(trained)
    assert not set_peft_model_state_dict(model, state, low_cpu_mem_usage=True).unexpected_keys
    assert relative_error(model(x).detach(), trained(x).detach()) < 1e-6


def test_weights_without_values_wait_for_them() -> None:
    """A share needs no values, and the start is found once there are some."""
    with torch.device("meta"):
        base = OneLayer(nn.Linear(12, 20))
    model = get_peft_model(base, RosaConfig(rank_share=0.25, target_modules=["layer"]))
    adapter, layer, x = only(model).adapter("default"), nn.Linear(12, 20), torch.randn(4, 12)
    assert adapter.size == RANK
    only(model).base_layer.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(model(x), layer(x))
    assert torch.equal(adapter.lora_A, adapter.placement.down)
    assert adapter.lora_A.any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"basis": "pinned"}, "basis='pinned' is not allowed with RosaConfig"),
        ({"sample_method": "mixed"}, "sample_method='mixed'"),
        ({"factorize_method": "minus"}, "factorize_method='minus'"),
        ({"rank_share": 0.0}, "rank_share=0.0"),
        ({"rank_share": 1.5}, "rank_share=1.5"),
        ({"rank_share": 0.5, "r": 4}, "rank_share=0.5 decides the ranks, but r=4"),
        ({"rank_share": 0.5, "rank_pattern": {"0": 2}}, "rank_share=0.5 decides the ranks"),
        ({"rank_budget": "1k"}, "rank_budget='1k' has no meaning with RosaConfig"),
        ({"rank_energy": 0.5}, "has no meaning with RosaConfig"),
        ({"alpha_pattern": {"0": 2.0}}, "alpha_pattern"),
        ({"r": 0}, "r=0"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RosaConfig(**options)


def test_a_rank_above_that_of_the_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="r=13 is too large for the module '0'"):
        rosa(nn.Linear(12, 20), r=13)
