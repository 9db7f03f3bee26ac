"""scaled_generator: the rotations of generators 2 √(n − 1) times smaller, for all that reads them, and in training."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import Stack, adapt, layers_of, randomize, relative_error
from isotune import BOFTConfig, GOFTConfig, OFTConfig, PsoftConfig, get_peft_model, hotswap_adapter
from isotune.algebra.cayley import CayleyMap
from isotune.algebra.skew import generator_scale, skew_from_vector, skew_size
from isotune.diagnostics.inspect import inspect
from isotune.errors import AdapterFileError
from isotune.methods import config as of_configs
from isotune.methods.config import IsotuneConfig

TARGETS = ["first", "second", "third"]
X = torch.linspace(-2, 2, 5 * 24).reshape(5, 24)
CASES: dict[str, IsotuneConfig] = {
    "psoft": PsoftConfig(r=6, rank_pattern={"second": 3}, target_modules=TARGETS),
    "psoft-series": PsoftConfig(r=6, use_cayley_neumann=True, cayley_neumann_eps=0.3, target_modules=TARGETS),
    "oft": OFTConfig(oft_block_size=8, block_size_pattern={"second": 4}, target_modules=TARGETS),
    "oft-output": OFTConfig(oft_block_size=8, side="output", target_modules=TARGETS),
    "coft": OFTConfig(oft_block_size=8, coft=True, eps=0.5, block_share=True, target_modules=TARGETS),
    "boft": BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=TARGETS),
}


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def scaled(config: IsotuneConfig) -> Any:
    config = copy.deepcopy(config)
    config.scaled_generator = True  # type: ignore[attr-defined]
    return config


def factor(operator: Any) -> float:
    """What a scaled generator of the same size is multiplied by."""
    size = getattr(operator, "block_size", operator.size)
    return 1 / (2 * math.sqrt(size - 1))


def pair(config: IsotuneConfig) -> tuple[PeftModel, PeftModel]:
    """A model with two scaled adapters, and one without the option whose generators are smaller by the factor."""
    models = []
    for one in (scaled(config), config):
        model = get_peft_model(stack(), copy.deepcopy(one), "a")
        model.add_adapter("b", copy.deepcopy(one))
        for seed, name in enumerate("ab"):
            randomize(model, name, std=0.3, seed=seed)
        models.append(model.eval())
    for layer in layers_of(models[1]):
        for name in "ab":
            operator: Any = layer.adapter(name)
            operator.generator.data.mul_(factor(operator))
    return models[0], models[1]


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    found: Tensor = model(X)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_smaller_generators_everywhere(case: str, tmp_path: Path) -> None:
    model, twin = pair(CASES[case])
    assert relative_error(output(model), output(twin)) < 1e-6
    assert relative_error(output(model), output(stack())) > 1e-2
    for one in (model, twin):
        one.add_weighted_adapter(["a", "b"], [0.7, 0.2], "mean")
        one.set_adapter("mean")
    assert relative_error(output(model), output(twin)) < 1e-5
    for one in (model, twin):
        one.set_adapter("a")
        for layer in layers_of(one):
            layer.set_scale("a", 0.5)
    assert relative_error(output(model), output(twin)) < 1e-6
    for one, name in ((model, "scaled"), (twin, "plain")):
        for layer in layers_of(one):
            layer.set_scale("a", 1.0)
        one.save_pretrained(str(tmp_path / name), selected_adapters=["a"])
    rows = [inspect(tmp_path / name / "a", stack()).layers for name in ("scaled", "plain")]
    for found, expected in zip(*rows, strict=True):
        assert found.update_norm == pytest.approx(expected.update_norm, rel=1e-5)
        assert found.largest_angle == pytest.approx(expected.largest_angle, rel=1e-4)
    loaded = PeftModel.from_pretrained(stack(), str(tmp_path / "scaled" / "a")).eval()
    assert relative_error(output(loaded), output(model)) < 1e-6
    assert relative_error(output(model.merge_and_unload(adapter_names=["a"])), output(twin)) < 1e-5


def test_q_is_the_entries_over_the_factor_and_then_bounded() -> None:
    entries = torch.randn(4, skew_size(5), dtype=torch.float64)
    q = skew_from_vector(entries, 5) / 4  # 2 √(5 − 1)
    eye = torch.eye(5, dtype=torch.float64)
    expected = (eye + q) @ torch.linalg.inv(eye - q) - eye
    torch.testing.assert_close(CayleyMap(5, scaled=True).difference(entries), expected)
    bounded = CayleyMap(5, generator_bound=0.3, scaled=True).generator(entries * 100)
    torch.testing.assert_close(skew_from_vector(bounded, 5).norm(dim=(1, 2)), torch.full((4,), 0.3).double())
    assert generator_scale(1) == 1.0
    assert CayleyMap(1, scaled=True).difference(torch.zeros(3, 0)).shape == (3, 1, 1)
    assert torch.autograd.gradcheck(CayleyMap(5, scaled=True).difference, entries.requires_grad_())


@pytest.mark.parametrize("size", [2, 8, 24])
def test_a_step_of_adam_is_as_one_at_a_rate_smaller_by_the_factor(size: int) -> None:
    """So a sweep of one form is one of the other, and the option changes nothing but which rate serves which size."""

    def steps(config: OFTConfig, rate: float) -> Tensor:
        model = get_peft_model(stack(), config)
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(own, lr=rate, eps=0.0)
        for step in range(5):
            optimizer.zero_grad()
            (model(X * (step + 1)).square().mean()).backward()
            optimizer.step()
        return output(model.eval())

    config = OFTConfig(oft_block_size=size, target_modules=["first"])
    rate = 1e-3
    found = steps(scaled(config), rate * 2 * math.sqrt(size - 1))
    assert relative_error(found, steps(config, rate)) < 1e-5
    assert relative_error(found, output(stack())) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_of_version_3_only_with_the_option(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CASES[case].save_pretrained(str(tmp_path / "plain"))
    scaled(CASES[case]).save_pretrained(str(tmp_path / "scaled"))
    plain, own = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("plain", "scaled"))
    assert "scaled_generator" not in plain
    assert plain["isotune_format"] == (2 if case == "oft-output" else 1)
    assert (own["scaled_generator"], own["isotune_format"]) == (True, 3)
    monkeypatch.setattr(of_configs, "FORMAT_VERSION", 2)  # an earlier release
    type(CASES[case]).from_pretrained(str(tmp_path / "plain"))
    with pytest.raises(AdapterFileError, match=r"format version 3.*Install a later release"):
        type(CASES[case]).from_pretrained(str(tmp_path / "scaled"))


def test_only_an_adapter_with_the_same_option_is_swapped_in(tmp_path: Path) -> None:
    for name, option in (("plain", False), ("one", True), ("other", True)):
        model = adapt(stack(), PsoftConfig(r=6, scaled_generator=option, target_modules=TARGETS))
        randomize(model, std=0.3, seed=len(name))
        model.save_pretrained(str(tmp_path / name))
        expected = output(model.eval())
    running = PeftModel.from_pretrained(stack(), str(tmp_path / "one")).eval()
    before = output(running)
    with pytest.raises(ValueError, match="scaled_generator=False instead of True"):
        hotswap_adapter(running, tmp_path / "plain")
    assert torch.equal(output(running), before)
    hotswap_adapter(running, tmp_path / "other")
    assert relative_error(output(running), expected) < 1e-6


def test_adapters_with_and_without_the_option_have_no_mean() -> None:
    model = get_peft_model(stack(), scaled(CASES["oft"]), "a")
    model.add_adapter("b", copy.deepcopy(CASES["oft"]))
    with pytest.raises(ValueError, match="different options"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")


def test_where_there_is_no_generator_there_is_no_option() -> None:
    with pytest.raises(ValueError, match="scaled_generator=True has no effect with psoft_orth=False"):
        PsoftConfig(psoft_orth=False, scaled_generator=True)
    with pytest.raises(TypeError, match="scaled_generator"):
        GOFTConfig(scaled_generator=True)  # type: ignore[call-arg]
