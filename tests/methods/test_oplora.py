"""OPLoRA: what it preserves of a weight, its start and training, the choice of k, its file, and its export to LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft import get_peft_model as peft_model
from torch import Tensor, nn

from helpers import (
    Chain,
    adapted_stack,
    layers_of,
    only,
    randomize,
    relative_error,
    tiny_bert,
    tiny_llama,
    trainable,
    transformers_takes_peft,
)
from isotune import OploraConfig, get_peft_model
from isotune.adapter.placement import left_vectors
from isotune.diagnostics.geometry import interference
from isotune.diagnostics.inspect import inspect
from isotune.errors import BaseMismatchError
from isotune.experiments.measure import kept_bytes
from isotune.files.export_lora import export_lora
from isotune.subspace.energy import rank_of_energy

SHAPES = [(20, 32), (32, 20), (24, 24)]


def decaying(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear layer whose singular values fall by a tenth each: well apart, as the theorem asks for."""
    layer = nn.Linear(in_features, out_features, dtype=dtype)
    left, _, right = torch.linalg.svd(torch.randn(out_features, in_features, dtype=torch.float64), full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(0.9 ** torch.arange(left.shape[1], dtype=torch.float64)) @ right)
    return layer


def model_of(*layers: nn.Module, **options: Any) -> Any:
    targets = [str(index) for index in range(len(layers))]
    config = OploraConfig(**{"r": 4, "preserved_rank": 5, "target_modules": targets, **options})
    return get_peft_model(nn.Sequential(*layers), config)


def strongest(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), σ (k,) and V (k, in) of a weight, by torch."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :k], values[:k], right[:k]


# -- what is preserved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_the_strongest_directions_see_the_base_s_weight(shape: tuple[int, int], alpha: float | None) -> None:
    model = model_of(decaying(*shape), lora_alpha=alpha)
    randomize(model, std=0.3)
    layer = only(model)
    weight, change = layer.unmerged_matrix(), layer.get_delta_weight("default")
    left, values, right = strongest(weight, 5)
    assert float(change.norm()) > 1
    assert relative_error((weight + change) @ right.T.float(), weight @ right.T.float()) < 1e-5
    assert relative_error(left.T.float() @ (weight + change), left.T.float() @ weight) < 1e-5
    own, _ = only(model).adapter("default").low_rank(weight)
    assert relative_error(change, alpha / 4 * _by_definition(layer, 5) if alpha else _by_definition(layer, 5)) < 1e-5
    assert own.shape == (shape[0], 4)
    assert float(values[-1]) > 0.5


def _by_definition(layer: Any, k: int) -> Tensor:
    adapter, weight = layer.adapter("default"), layer.unmerged_matrix()
    left, _, right = strongest(weight, k)
    a, b = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
    eyes = (torch.eye(n, dtype=torch.float64) for n in weight.shape)
    rows, columns = eyes
    return ((rows - left @ left.T) @ b @ a @ (columns - right.T @ right)).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_strongest_triplets_are_those_of_the_adapted_weight(shape: tuple[int, int]) -> None:
    """As long as what the update does to the other directions stays below the k-th singular value."""
    model = model_of(decaying(*shape, torch.float64))
    randomize(model, std=0.3)
    layer = only(model)
    weight, change = layer.unmerged_matrix(), layer.get_delta_weight("default")
    left, values, right = strongest(weight, 5)
    rest = weight - left @ torch.diag(values) @ right
    change = change * (
        0.9 * float(values[-1] - torch.linalg.matrix_norm(rest, 2)) / torch.linalg.matrix_norm(change, 2)
    )
    new_left, new_values, new_right = strongest(weight + change, 5)
    torch.testing.assert_close(new_values, values, rtol=1e-10, atol=1e-12)
    signs = torch.sign((new_left * left).sum(0))
    torch.testing.assert_close(new_left * signs, left, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(new_right * signs[:, None], right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projectors_on_a_half_precision_base_are_float32(dtype: torch.dtype) -> None:
    model = model_of(decaying(20, 32).to(dtype))
    adapter = only(model).adapter("default")
    for _ in range(2):
        right, left = adapter.placement.factors
        assert right.dtype == left.dtype == torch.float32
        for basis in (right, left.mT):
            assert float((basis @ basis.mT - torch.eye(5)).abs().max()) < 1e-5
        model.to(dtype)  # and a cast of the model does not round them
    randomize(model, std=0.3)
    weight, change = only(model).unmerged_matrix().float(), only(model).get_delta_weight("default")
    assert float((change @ strongest(weight, 5)[2].T.float()).norm() / change.norm()) < 1e-2
    assert float((change @ right.T).norm() / change.norm()) < 2e-2 if dtype == torch.bfloat16 else 3e-3


def test_no_vector_belongs_to_a_singular_value_of_zero() -> None:
    left, _, right = torch.linalg.svd(torch.randn(9, 7), full_matrices=False)
    values = torch.tensor([3.0, 1.0, 0.0, 0.0])
    found = left_vectors((left[:, :4] * values) @ right[:4] @ right[:4].T, torch.float32)
    torch.testing.assert_close(found[:, :2], left[:, :2], rtol=1e-5, atol=1e-5)
    assert not found[:, 2:].any()


def test_weak_triplets_of_a_tall_weight_are_preserved() -> None:
    """However many rows there are, what counts as rounding does not grow."""
    left, right = torch.linalg.qr(torch.randn(32768, 8)).Q, torch.linalg.qr(torch.randn(8, 8)).Q
    values = torch.tensor([100.0, *(0.3 - 0.01 * i for i in range(7))])
    layer = nn.Linear(8, 32768, bias=False)
    layer.weight.data = (left * values) @ right.T
    model = model_of(layer, preserved_rank=4)
    randomize(model, std=0.3)
    change = only(model).get_delta_weight("default")
    assert float((left[:, :4].T @ change).norm() / change.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_weight_of_low_rank_may_be_cast(dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 32, bias=False)
    layer.weight.data = torch.randn(32, 2) @ torch.randn(2, 32)
    model = model_of(layer)
    randomize(model, std=0.3)
    before, x = only(model).get_delta_weight("default").double(), torch.randn(5, 32)
    model.to(dtype)(x.to(dtype))
    assert relative_error(only(model).get_delta_weight("default").double(), before) < 2e-2


# -- start and training ----------------------------------------------------------------------------------------------


def test_it_starts_as_pefts_lora_does() -> None:
    torch.manual_seed(3)
    ours = model_of(decaying(20, 32))
    layer = decaying(20, 32)
    torch.manual_seed(3)
    decaying(20, 32)
    theirs = peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"]))
    adapter, lora = only(ours).adapter("default"), theirs.base_model.model[0]
    bound = 32**-0.5
    for a in (adapter.lora_A, lora.lora_A["default"].weight):
        assert bound * 0.9 < float(a.detach().abs().max()) <= bound
    assert not adapter.lora_B.any()
    assert adapter.is_identity()
    x = torch.randn(6, 32)
    assert torch.equal(ours(x), only(ours).base_layer(x))


def test_training_is_that_of_the_definition() -> None:
    """Ten steps of AdamW beside a plain torch twin with explicit projectors: the same numbers."""
    layer = decaying(20, 32, torch.float64)
    model = model_of(layer, lora_alpha=8.0)
    adapter = only(model).adapter("default")
    left, _, right = strongest(layer.weight.detach(), 5)
    rows, columns = torch.eye(20).double() - left @ left.T, torch.eye(32).double() - right.T @ right
    a, b = (nn.Parameter(p.detach().clone()) for p in (adapter.lora_A, adapter.lora_B))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x, target = torch.randn(30, 32, dtype=torch.float64), torch.randn(30, 20, dtype=torch.float64)
    optimizers = [torch.optim.AdamW(own, lr=1e-2) for own in (trainable(model).values(), [a, b])]
    for _ in range(10):
        found = model(x)
        expected = nn.functional.linear(x, weight + 2.0 * rows @ b @ a @ columns, bias)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for output, optimizer in zip((found, expected), optimizers, strict=True):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(adapter.lora_A, a, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(adapter.lora_B, b, rtol=1e-9, atol=1e-10)


class Twice(nn.Module):
    """A layer that is called twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = decaying(20, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(2 * x)


def test_two_losses_of_one_pass_may_be_differentiated_one_after_the_other() -> None:
    """Both calls of the layer use the same factors, whose graph must outlive the first backward pass."""
    model = get_peft_model(Twice(), OploraConfig(r=4, preserved_rank=5, target_modules=["layer"]))
    randomize(model)
    x = torch.randn(6, 32)
    one, two = model(x)
    (one.sum() + two.square().sum()).backward()
    expected = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    one, two = model(x)
    one.sum().backward()
    two.square().sum().backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_what_is_kept_for_backward_is_what_lora_keeps_and_no_more() -> None:
    """x, shared by the layers that read it, and x Downᵀ; PEFT's LoRA keeps the same."""
    kept = {}
    for name, config in {
        "oplora": OploraConfig(r=4, preserved_rank=3, target_modules=["q_proj", "k_proj", "v_proj"]),
        "lora": LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]),
    }.items():
        model = get_peft_model(tiny_llama(layers=2), config).train()
        x = torch.randn(2, 64, 64)
        kept[name] = kept_bytes(model, lambda model=model, x=x: model(inputs_embeds=x.clone().requires_grad_()))
    factors = 2 * 3 * 2 * 4 * 4 * (64 + 64)  # Down and Up of every layer, made from the parameters
    assert kept["oplora"] <= kept["lora"] + factors


# -- the choice of k -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.3, 0.64, 0.99, 1.0])
def test_the_rank_of_an_energy_is_the_least(energy: float) -> None:
    values = torch.rand(40).sort(descending=True).values
    k = rank_of_energy(values, energy)
    shares = values.double().square().cumsum(0) / values.double().square().sum()
    assert float(shares[k - 1]) >= energy - 1e-9
    assert k == 1 or float(shares[k - 2]) < energy
    assert rank_of_energy(torch.zeros(5), energy) == 1


def test_k_by_energy_is_chosen_once_and_stored_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = decaying(20, 32), decaying(24, 20)
    base = nn.Sequential(*copy.deepcopy(layers))
    model = model_of(*layers, preserved_energy=0.7)
    randomize(model)
    chosen = model.peft_config["default"].preserved_rank_pattern
    for index, layer in enumerate(layers_of(model)):
        values = torch.linalg.svdvals(layer.unmerged_matrix())
        assert layer.adapter("default").preserved == chosen[f"^{index}"] == rank_of_energy(values, 0.7)
        assert layer.bases("default")[0].stored.shape[0] == chosen[f"^{index}"]
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["preserved_rank_pattern"] == chosen
    monkeypatch.setattr(OploraConfig, "fit", lambda *_: pytest.fail("a search in loading"))
    x = torch.randn(5, 32)
    assert relative_error(PeftModel.from_pretrained(base, tmp_path)(x).detach(), model(x).detach()) < 1e-5


@transformers_takes_peft
def test_a_file_never_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is loaded; on a base of another precision k might be another."""
    asked = OploraConfig(target_modules=["query"], preserved_energy=0.5, r=2)
    model = tiny_bert().bert
    model.add_adapter(asked)
    model.save_pretrained(tmp_path)
    assert "preserved_energy" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert "preserved_energy" not in asked.to_dict()
    monkeypatch.setattr(OploraConfig, "fit", lambda *_: pytest.fail("a choice in loading"))
    tiny_bert().bert.load_adapter(str(tmp_path))
    PeftModel.from_pretrained(tiny_bert().bert, tmp_path, config=PeftConfig.from_pretrained(tmp_path))


def test_k_by_energy_needs_values() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="has no values yet"):
        get_peft_model(base, OploraConfig(preserved_energy=0.5, target_modules=["0"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserved_rank": 20}, "preserved_rank=20 is too large.*at most 19"),
        ({"preserved_rank": 0}, "preserved_rank=0"),
        ({"preserved_energy": 1.0}, "preserved_energy=1.0.*between 0 and 1"),
        ({"preserved_energy": 0.9999999}, "too large for the module '0'.*preserved_energy"),
        ({"preserved_rank_pattern": {"0": -1}}, r"preserved_rank_pattern\['0'\]=-1"),
        ({"preserved_rank_pattern": {".*0": 3}, "preserved_energy": 0.5}, "preserved_energy=0.5 chooses k for every"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(decaying(20, 32), **options)


def test_each_option_changes_the_output() -> None:
    torch.manual_seed(0)
    layer, x = decaying(20, 32), torch.randn(4, 32)
    outputs = []
    for options in ({}, {"r": 3}, {"preserved_rank": 6}, {"lora_alpha": 1.0}, {"preserved_energy": 0.4}):
        torch.manual_seed(1)
        model = model_of(copy.deepcopy(layer), **{"init_weights": False, **options})
        outputs.append(model(x).detach())
    for index, one in enumerate(outputs):
        assert all(relative_error(one, other) > 1e-3 for other in outputs[:index])


# -- file, export, inspection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["pinned", "embedded"])
def test_save_and_load_and_another_base(basis: str, tmp_path: Path) -> None:
    model = adapted_stack_of(basis=basis)
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 24)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert relative_error(loaded(x).detach(), model(x).detach()) < 1e-5
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.first.weight.copy_(torch.randn_like(other.first.weight))
    if basis == "pinned":
        with pytest.raises(BaseMismatchError, match="first"):
            PeftModel.from_pretrained(other, tmp_path)
    else:
        PeftModel.from_pretrained(other, tmp_path)


def adapted_stack_of(**options: Any) -> Any:
    targets = ["first", "second", "third"]
    config = OploraConfig(r=4, preserved_rank=5, target_modules=targets, **options)
    model = adapted_stack(target_modules=targets).unload()
    model = get_peft_model(model, config).eval()
    randomize(model)
    return model


def test_the_export_to_lora_is_exact(tmp_path: Path) -> None:
    model = adapted_stack_of(lora_alpha=7.0)
    base, x = copy.deepcopy(model).unload(), torch.randn(5, 24)
    expected = model(x).detach()
    report = export_lora(model, tmp_path / "lora")
    assert "exact" in str(report)
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    assert relative_error(lora(x).detach(), expected) < 1e-5


def test_two_adapters_share_a_placement_only_if_they_preserve_as_much() -> None:
    model = model_of(decaying(20, 32))
    model.add_adapter("same", OploraConfig(r=2, preserved_rank=5, target_modules=["0"]))
    model.add_adapter("other", OploraConfig(r=4, preserved_rank=4, target_modules=["0"]))
    adapter = only(model).adapter
    assert adapter("same").placement.down is adapter("default").placement.down
    assert adapter("other").placement.down.shape == (4, 32)


def test_a_new_placement_is_seen_without_gradients() -> None:
    """The factors that an evaluation keeps between passes are of one placement."""
    model = model_of(decaying(20, 32)).eval()
    randomize(model)
    layer, x = only(model), torch.randn(4, 32)
    with torch.no_grad():
        before = model(x)
        layer.put_on_basis("default", [torch.eye(5, 32)], principal=False)
        after = model(x)
        change = layer.get_delta_weight("default")
    assert relative_error(after, before) > 1e-3
    assert float(change[:, :5].norm() / change.norm()) < 1e-5


def test_a_mean_is_refused() -> None:
    model = model_of(decaying(20, 32))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(ValueError, match="no mean"):
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")


def test_the_share_of_an_update_in_the_strongest_directions(tmp_path: Path) -> None:
    """0 for OPLoRA, 1 for PSOFT at k = r; between for LoRA-like updates; by the option's k where one is given."""
    from isotune import OFTConfig, PsoftConfig

    base = Chain(24, 32, 24)
    configs = {
        "oplora": OploraConfig(r=4, preserved_rank=6, target_modules=r"(.*\.)?layers\.\d+"),
        "psoft": PsoftConfig(r=6, target_modules=r"(.*\.)?layers\.\d+"),
        "oft": OFTConfig(oft_block_size=8, target_modules=r"(.*\.)?layers\.\d+"),
        "oft-output": OFTConfig(oft_block_size=8, side="output", target_modules=r"(.*\.)?layers\.\d+"),
    }
    found = {}
    for name, config in configs.items():
        model = get_peft_model(copy.deepcopy(base), config)
        randomize(model, std=0.3)
        model.save_pretrained(tmp_path / name)
        report = inspect(tmp_path / name, copy.deepcopy(base), top=None if name == "oplora" else 6)
        found[name] = report.layers
        assert "strongest directions" in report.summary()
        for layer, own in zip(report.layers, layers_of(model), strict=True):
            weight = own.unmerged_matrix()
            left, _, right = (one.float() for one in strongest(weight, 6))
            change = own.fold(["default"], weight) - weight
            assert layer.top == 6
            expected = float((left.T @ change @ right.T).norm() ** 2 / change.norm() ** 2)
            assert layer.interference == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert all(layer.interference < 1e-9 and layer.orthogonality_error is None for layer in found["oplora"])
    assert all(layer.interference > 0.999 for layer in found["psoft"])
    assert all(0.01 < layer.interference < 0.9 for name in ("oft", "oft-output") for layer in found[name])
    wider = inspect(tmp_path / "oplora", copy.deepcopy(base), top=12)
    assert all(layer.top == 12 and layer.interference > 1e-4 for layer in wider.layers)
    with pytest.raises(ValueError, match="top=0"):
        inspect(tmp_path / "oplora", base, top=0)
    assert interference(torch.zeros(3, 4), torch.eye(3)[:, :1], torch.eye(4)[:1]) == 0
