"""Sizes that follow from a model: chosen, put into adapters as numbers, and refused where they have no meaning."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import tiny_bert, tiny_gpt2, tiny_opt
from isotune import (
    BOFTConfig,
    CersaConfig,
    GOFTConfig,
    HRAConfig,
    LoraXsConfig,
    OFTConfig,
    OploraConfig,
    PsoftConfig,
    QGOFTConfig,
    add_adapter,
    choose_ranks,
    get_peft_model,
)
from isotune.methods.config import IsotuneConfig
from isotune.subspace.energy import kept_shares
from isotune.tuner.sizes import ChosenSizes, LayerSize


def batches(width: int = 64, count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input": torch.randn(5, width, generator=generator)} for _ in range(count)]


def stack(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(widths)))


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "budget"),
    [
        (PsoftConfig, 500),
        (LoraXsConfig, 500),
        (OFTConfig, 900),
        (BOFTConfig, 900),
        (lambda **own: PsoftConfig(psoft_mag_a=False, psoft_mag_b=False, **own), 500),
        (lambda **own: PsoftConfig(psoft_orth=False, **own), 500),
        (lambda **own: OFTConfig(side="output", **own), 900),
        (lambda **own: OFTConfig(block_share=True, **own), 900),
        (lambda **own: BOFTConfig(boft_n_butterfly_factor=2, **own), 2000),
        (lambda **own: BOFTConfig(butterfly_factor_pattern={"1": 3}, **own), 2000),
    ],
)
def test_a_budget_is_kept(config: Any, budget: int) -> None:
    asked = config(target_modules=["0", "1", "2"], rank_budget=budget)
    base = stack(64, 48, 64, 8)
    found = choose_ranks(base, asked)
    given = {key: value for key, value in found.options.items() if key != "rank_budget"}
    explicit = config(target_modules=["0", "1", "2"], **given)
    one, other = get_peft_model(copy.deepcopy(base), asked), get_peft_model(base, explicit)
    assert parameters_of(one) == parameters_of(other) == found.parameters <= budget
    assert found.parameters > 0.4 * budget
    assert found.uniform is None or found.uniform.parameters <= budget
    assert [tuple(p.shape) for p in one.parameters()] == [tuple(p.shape) for p in other.parameters()]


@pytest.mark.parametrize("measure", ["squares", "values"])
def test_ranks_reach_a_share_of_the_energy_and_no_more(measure: Any) -> None:
    base = stack(64, 48, 32)
    config = PsoftConfig(target_modules=["0", "1"], r="auto", rank_energy=0.8, rank_measure=measure)
    for layer, row in zip(base, choose_ranks(base, config).layers, strict=True):
        values = torch.linalg.svdvals(layer.weight.detach().double())
        kept = kept_shares(values.square() if measure == "squares" else values)
        assert kept[row.size - 1] >= 0.8 > kept[row.size - 2]
        assert row.energy == pytest.approx(kept[row.size - 1])
        assert row.shape == tuple(layer.weight.shape)


def test_auto_is_nine_tenths() -> None:
    base = stack(32, 24)
    assert (
        choose_ranks(base, PsoftConfig(target_modules=["0"], r="auto")).layers
        == choose_ranks(base, PsoftConfig(target_modules=["0"], r="auto", rank_energy=0.9)).layers
    )


def test_steep_layers_get_fewer_directions() -> None:
    base = stack(32, 32, 32)
    with torch.no_grad():
        base[0].weight.copy_(torch.diag(0.5 ** torch.arange(32.0)))
    found = choose_ranks(base, PsoftConfig(target_modules=["0", "1"], rank_budget=200))
    assert found.layers[0].size < found.layers[1].size
    assert found.uniform is not None
    assert found.energy > found.uniform.energy


def test_activations_decide_by_the_energy_of_outputs() -> None:
    base, data = stack(64, 48, 32), batches()
    config = PsoftConfig(target_modules=["0", "1"], r="auto", rank_energy=0.8, rank_measure="activations")
    found = choose_ranks(base, config, data=data)
    x = torch.cat([batch["input"] for batch in data])
    for layer, row in zip(base, found.layers, strict=True):
        left = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False).U
        energies = (x.double() @ layer.weight.detach().double().mT @ left).square().sum(0)
        kept = kept_shares(energies)
        assert row.energy == pytest.approx(kept[row.size - 1], rel=1e-4)
        assert kept[row.size - 2] < 0.8 <= kept[row.size - 1] + 1e-6
        x = layer(x).detach()
    with pytest.raises(ValueError, match="needs data, which get_peft_model is not given"):
        get_peft_model(base, config)


def test_padding_has_no_energy() -> None:
    model = tiny_bert()
    config = PsoftConfig(target_modules=["query", "value"], rank_budget=800)
    ids = torch.arange(24).reshape(2, 12) % 90
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    noise = ids.clone()
    noise[:, 8:] = 3
    one, other = (
        choose_ranks(model, config, data=[{"input_ids": own, "attention_mask": mask}]) for own in (ids, noise)
    )
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.size == right.size
        assert left.energy == pytest.approx(right.energy, rel=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_opt()
    model.lm_head.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    model.train()
    choose_ranks(
        model,
        LoraXsConfig(target_modules="all-linear", rank_budget="2k"),
        data=[{"input_ids": torch.ones(1, 4).long()}],
    )
    with pytest.raises(ValueError, match="too small"):
        choose_ranks(model, LoraXsConfig(target_modules="all-linear", rank_budget=1))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modules == [type(module) for module in model.modules()]
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert hooks == sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    assert model.training


@pytest.mark.parametrize("targets", [["c_attn"], ["wte"]])
def test_other_hosts(targets: list[str]) -> None:
    model = tiny_gpt2()
    adapted = get_peft_model(model, PsoftConfig(target_modules=targets, r="auto", rank_energy=0.5))
    config = adapted.peft_config["default"]
    assert isinstance(config.r, int)
    assert config.r > 1
    ids = torch.ones(1, 4).long()
    with adapted.disable_adapter():
        expected = adapted(ids).logits
    torch.testing.assert_close(adapted(ids).logits, expected)


def test_what_is_saved_are_numbers(tmp_path: Path) -> None:
    base = stack(64, 48, 32)
    model = get_peft_model(copy.deepcopy(base), PsoftConfig(target_modules=["0", "1"], rank_budget="400"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"rank_budget", "rank_energy", "rank_measure"} & stored.keys()
    assert isinstance(stored["r"], int)
    assert stored["isotune_format"] == 1
    assert len(stored["rank_pattern"]) == 1
    x = torch.randn(3, 64)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


@pytest.mark.parametrize(
    "config",
    [
        PsoftConfig(target_modules=["0"], r="auto", rank_energy=0.9),
        PsoftConfig(target_modules=["0"], rank_budget=400),
        OFTConfig(target_modules=["0"], rank_budget=100),
        CersaConfig(target_modules=["0"]),
        OploraConfig(target_modules=["0"], r=2, preserved_energy=0.5),
    ],
)
def test_one_configuration_for_two_models_chooses_for_each(config: IsotuneConfig, tmp_path: Path) -> None:
    """Each model has a plain configuration of its own, with numbers, and the given one still asks."""
    before = copy.deepcopy(config)
    models = [(stack(width, width), get_peft_model(stack(width, width), config)) for width in (16, 40)]
    assert config == before
    assert config.chooses
    for base, model in models:
        for _ in range(2):
            model.save_pretrained(tmp_path)
            model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
            assert not model.peft_config["default"].chooses
        x = torch.randn(3, base[0].in_features)
        torch.testing.assert_close(model(x), base(x))
    one, other = (dataclasses.replace(model.peft_config["default"]) for _, model in models)
    assert one != other
    assert not one.chooses


def test_heads_and_targets_stand_in_the_file_of_a_choice(tmp_path: Path) -> None:
    """PEFT writes some of what it finds into the configuration, which then is the model's own."""
    config = PsoftConfig(target_modules="all-linear", rank_budget=4000, task_type="SEQ_CLS")
    get_peft_model(tiny_bert(), config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "classifier" in stored["modules_to_save"]
    assert stored["target_modules"] != "all-linear"


def test_a_second_adapter_and_a_mean_keep_their_own() -> None:
    model = get_peft_model(stack(64, 48), PsoftConfig(target_modules=["0"], r=4))
    add_adapter(model, "chosen", PsoftConfig(target_modules=["0"], rank_budget=300))
    add_adapter(model, "again", PsoftConfig(target_modules=["0"], rank_budget=300))
    assert model.peft_config["chosen"].r == model.peft_config["again"].r > 4
    model.base_model.add_weighted_adapter(["chosen", "again"], [0.5, 0.5], "mean")
    assert model.peft_config["mean"].r == model.peft_config["chosen"].r
    with pytest.raises(ValueError, match="budget of 1 parameters is too small"):
        add_adapter(model, "poor", PsoftConfig(target_modules=["0"], rank_budget=1))
    assert sorted(model.peft_config) == ["again", "chosen", "default", "mean"]
    model.set_adapter("chosen")
    assert parameters_of(model) <= 300


def test_a_refused_choice_leaves_the_model() -> None:
    base = stack(16, 16)
    with pytest.raises(ValueError, match="too small"):
        get_peft_model(base, PsoftConfig(target_modules=["0"], rank_budget=1))
    assert type(base[0]) is nn.Linear
    config = OploraConfig(target_modules=["0"], preserved_energy=0.99999)
    with pytest.raises(ValueError, match="too large"):
        get_peft_model(base, config)
    assert (config.preserved_rank_pattern, config.sized) == ({}, True)
    with pytest.raises(ValueError, match="no values yet"):
        get_peft_model(base.to("meta"), PsoftConfig(target_modules=["0"], r="auto"))


def refusals() -> Iterator[Any]:
    yield HRAConfig, {"rank_budget": 100}, "HRAConfig, whose size by layer nothing can choose; set r yourself"
    yield GOFTConfig, {"rank_budget": 100}, "GOFTConfig, whose size by layer nothing can choose"
    yield QGOFTConfig, {"rank_budget": 100}, "QGOFTConfig, whose size by layer nothing can choose"
    yield HRAConfig, {"r": "auto"}, "r='auto' is not allowed"
    yield PsoftConfig, {"r": "atuo"}, "r='atuo' is not allowed"
    yield PsoftConfig, {"r": 46, "rank_budget": 100}, 'set r="auto", or leave rank_budget out'
    yield PsoftConfig, {"r": 32, "rank_budget": 100}, "r=32 and rank_budget=100"  # the default, given
    yield PsoftConfig, {"r": 32, "rank_energy": 0.5}, "but r=32 .* is given too"
    yield PsoftConfig, {"rank_pattern": {"q": 2}, "rank_budget": 100}, "rank_pattern"
    yield PsoftConfig, {"r": 46, "rank_energy": 0.5}, 'set r="auto"'
    yield PsoftConfig, {"r": "auto", "rank_energy": 0.5, "rank_budget": 9}, "both given"
    yield PsoftConfig, {"r": "auto", "rank_energy": 1.5}, r"it must be in \(0, 1\]"
    yield PsoftConfig, {"r": "auto", "psoft_alpha": 8.0}, "would give every layer another scale"
    yield PsoftConfig, {"rank_budget": "80q"}, "such as 80000, 80k or 1.2M"
    yield PsoftConfig, {"rank_budget": 0}, "such as 80000, 80k or 1.2M"
    yield OFTConfig, {"oft_block_size": 8, "rank_budget": 100}, "oft_block_size=8 and rank_budget=100"
    yield OFTConfig, {"r": 8, "rank_budget": 100}, "r=8 and rank_budget=100"
    yield BOFTConfig, {"boft_block_num": 8, "rank_budget": 100}, "boft_block_num=8 and rank_budget=100"


@pytest.mark.parametrize(("config", "options", "said"), [*refusals()])
def test_contradictions_are_refused(config: type[IsotuneConfig], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(target_modules=["0"], **options)


def test_a_configuration_that_has_met_no_model_is_not_saved(tmp_path: Path) -> None:
    for config in (PsoftConfig(r="auto"), OFTConfig(rank_budget=100), OploraConfig(preserved_energy=0.5)):
        with pytest.raises(ValueError, match="has not met one yet"):
            config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no rank yet"):
        PsoftConfig(r="auto").rank_of("q")


def test_data_that_say_nothing_are_refused() -> None:
    config = PsoftConfig(target_modules=["wte"], rank_budget=100)
    with pytest.raises(ValueError, match="are not vectors that its weight multiplies"):
        choose_ranks(tiny_gpt2(), config, data=[{"input_ids": torch.ones(1, 4).long()}])
    rotated = OFTConfig(target_modules=["0"], rank_budget=100, side="output")
    with pytest.raises(ValueError, match='Leave data out, or set side="input"'):
        choose_ranks(stack(8, 8), rotated, data=batches(8))
    with pytest.raises(ValueError, match="hold no batch"):
        choose_ranks(stack(8, 8), PsoftConfig(target_modules=["0"], rank_budget=100), data=[])
    with pytest.raises(ValueError, match="gives its sizes itself"):
        choose_ranks(stack(8, 8), PsoftConfig(target_modules=["0"]))
    adapted = get_peft_model(stack(8, 8), PsoftConfig(target_modules=["0"], r=2))
    with pytest.raises(ValueError, match="has adapters already"):
        choose_ranks(adapted, PsoftConfig(target_modules=["0"], rank_budget=100))


def test_names_that_end_with_others() -> None:
    rows = tuple(
        LayerSize(name, (8, 8), size, 1.0, 1) for name, size in [("fc", 2), ("a.fc", 3), ("b.fc", 1), ("c", 1)]
    )
    options = ChosenSizes(rows, "r", "rank_pattern", None).options
    stored = PsoftConfig(r=options["r"], rank_pattern=dict(sorted(options["rank_pattern"].items())))
    assert [stored.rank_of(row.module) for row in rows] == [row.size for row in rows]
