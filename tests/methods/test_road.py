"""RoAd against its paper and beside PEFT's: the same function of the same parameters, training, files, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import OneLayer, Stack, adapt, assert_all_differ, only, randomize, relative_error, tiny_opt, trainable
from isotune import RoadConfig, get_peft_model
from isotune.errors import AdapterFileError
from isotune.files.peft_import import import_peft
from isotune.methods.road import RoadOperator

VARIANTS = ("road_1", "road_2", "road_4")
saves_biases = Version(peft.__version__) >= Version("0.21")


@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_are_turned_as_in_the_paper(variant: str) -> None:
    """With groups of two, by the 2 × 2 matrices of equation 3, shared as table 1 says."""
    operator = RoadOperator(6, 2, variant)
    operator.randomize_parameters()
    angles, scales = operator.angles.double(), operator.scales.double()
    blocks = []
    for pair in range(3):
        # The numbers of the entries 11, 12, 21, 22: rows share theirs in road_2, all four in road_1. PEFT, whose order
        # this is, stores those of road_4 by entry: 11, 22 of the diagonal, then 12, 21.
        at = {"road_1": [0] * 4, "road_2": [0, 0, 1, 1], "road_4": [0, 2, 3, 1]}[variant]
        a, b, c, d = (len(angles) // 3 * pair + place for place in at)
        blocks.append(
            torch.stack(
                [
                    torch.stack([scales[a] * angles[a].cos(), -scales[b] * angles[b].sin()]),
                    torch.stack([scales[c] * angles[c].sin(), scales[d] * angles[d].cos()]),
                ]
            )
        )
    torch.testing.assert_close(operator.double().matrix(), torch.block_diag(*blocks))


def test_outputs_are_paired_with_those_half_a_group_away() -> None:
    operator = RoadOperator(12, 6)
    operator.randomize_parameters()
    mixed = [tuple(pair) for pair in (operator.matrix() - operator.matrix().diag().diag()).nonzero().tolist()]
    assert mixed == [(0, 3), (1, 4), (2, 5), (3, 0), (4, 1), (5, 2), *((i + 6, (i + 3) % 6 + 6) for i in range(6))]


def theirs(base: nn.Module, variant: str, targets: Any, group: int = 8) -> Any:
    """PEFT's RoAd with parameters as if trained."""
    torch.manual_seed(1)
    config = peft.RoadConfig(variant=variant, group_size=group, target_modules=targets, init_weights=False)
    return peft.get_peft_model(base, config).eval()


def linear(bias: bool, seed: int = 0) -> OneLayer:
    torch.manual_seed(seed)
    return OneLayer(nn.Linear(12, 24, bias=bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_parameters_give_peft_s_function_and_gradients(variant: Any, bias: bool) -> None:
    """Of a bias PEFT turns it too: isotune's M acts on the rest, and the bias that goes with it is M b."""
    other = theirs(linear(bias), variant, ["layer"])
    config = RoadConfig(variant=variant, group_size=8, target_modules=["layer"])
    ours = get_peft_model(linear(bias), config).eval()
    operator, given = only(ours).adapter("default"), other.base_model.model.layer
    with torch.no_grad():
        operator.angles.copy_(given.road_theta["default"])
        operator.scales.copy_(given.road_alpha["default"])
    x = torch.randn(5, 12)
    offset: Tensor | float = 0.0
    if bias:
        own = only(ours).host.module.bias
        offset = operator.matrix().detach() @ own.detach() - own.detach()
    assert relative_error(ours(x) + offset, other(x)) < 1e-6
    assert relative_error(ours(x), linear(bias)(x)) > 1e-2
    other.merge_adapter()
    ours.merge_adapter()
    assert relative_error(only(ours).host.weight, given.get_base_layer().weight) < 1e-6
    if bias:
        return
    other.unmerge_adapter()
    ours.unmerge_adapter()
    for model in (ours, other):
        (model(x) - 1).square().mean().backward()
    assert relative_error(operator.angles.grad, given.road_theta["default"].grad) < 1e-5
    assert relative_error(operator.scales.grad, given.road_alpha["default"].grad) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_beside_peft_gives_the_same_losses(variant: Any) -> None:
    ours = get_peft_model(linear(False), RoadConfig(variant=variant, group_size=8, target_modules=["layer"]))
    config = peft.RoadConfig(variant=variant, group_size=8, target_modules=["layer"])
    x, target = torch.randn(30, 12), torch.randn(30, 24)
    curves = []
    for model in (ours, peft.get_peft_model(linear(False), config)):
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
        losses = []
        for _ in range(10):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0] - 1e-3


# -- PEFT's folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_imported_folder_is_the_same_function(variant: str, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 24)
    state = Stack(bias=bias).state_dict()

    def base() -> Stack:
        found = Stack(bias=bias).eval()
        found.load_state_dict(state)
        return found

    if bias and not saves_biases:
        pytest.skip("PEFT before 0.21 leaves trained biases out of its file, so this is refused (below)")
    model = theirs(base(), variant, ["first", "third"])
    model.save_pretrained(tmp_path / "peft")
    expected, plain = model(x).detach(), base()(x)
    ours: Any = import_peft(tmp_path / "peft", base())
    assert (ours.peft_config["default"].variant, ours.peft_config["default"].side) == (variant, "output")
    assert ours.peft_config["default"].bias == ("isotune_only" if bias else "none")
    ours.save_pretrained(tmp_path / "ours")
    back = PeftModel.from_pretrained(base(), tmp_path / "ours")
    for found in (ours, back, back.merge_and_unload()):
        assert float((found.eval()(x) - expected).norm() / (expected - plain).norm()) < 1e-5


@pytest.mark.skipif(not saves_biases, reason="OPT has biases, which PEFT before 0.21 leaves out of its file")
def test_a_whole_model_is_converted_on_the_command_line(tmp_path: Path) -> None:
    tiny_opt().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    model = theirs(base(), "road_2", ["q_proj", "fc2"], group=32)
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "peft")
    found = CliRunner().invoke(cli.app, ["import", str(tmp_path / "peft"), "-o", str(tmp_path / "ours")])
    assert not found.exit_code, found.output
    tokens = torch.arange(4, 18).reshape(2, 7)
    with torch.no_grad():
        plain, expected = base()(tokens).logits, model(tokens).logits
        ours = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()(tokens).logits
    assert float((ours - expected).norm() / (expected - plain).norm()) < 1e-5


def test_biases_that_peft_would_not_save_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isotune.files.peft_import import rotations

    theirs(linear(True), "road_1", ["layer"]).save_pretrained(tmp_path)
    monkeypatch.setattr(rotations, "get_peft_model_state_dict", lambda model: {})
    base = linear(True)
    bias: Any = base.layer.bias
    before = bias.detach().clone()
    with pytest.raises(AdapterFileError, match="does not save these: pip install -U peft"):
        import_peft(tmp_path, base)
    assert torch.equal(bias, before)


# -- options -----------------------------------------------------------------------------------------------------------

KNOBS: list[dict[str, Any]] = [
    {"group_size": 4},
    {"variant": "road_2"},
    {"variant": "road_4"},
    {"side": "input"},
    {"init_weights": True},
]


def test_every_knob_changes_the_output() -> None:
    x, outputs = torch.randn(4, 24), {}
    for knob in [{}, *KNOBS]:
        torch.manual_seed(0)
        base = Stack()
        torch.manual_seed(1)
        options = {"group_size": 8, "init_weights": False, "target_modules": ["second"], **knob}
        outputs[str(knob)] = adapt(base, RoadConfig(**options))(x).detach()
    assert_all_differ(outputs)


def test_what_is_refused() -> None:
    for options, named in (
        ({"group_size": 7}, "group_size=7 is not allowed; it must be an even number"),
        ({"group_size": 0}, "group_size=0"),
        ({"variant": "road_3"}, "variant='road_3'"),
    ):
        with pytest.raises(ValueError, match=named):
            RoadConfig(**options)
    with pytest.raises(ValueError, match=r"group_size=64 does not divide the 24 outputs of 'layer'; .* are 24 or 12"):
        get_peft_model(linear(True), RoadConfig(target_modules=["layer"]))
    odd = OneLayer(nn.Linear(12, 7))
    with pytest.raises(ValueError, match=r"the 7 outputs of 'layer'; no even number does.*exclude_modules"):
        get_peft_model(odd, RoadConfig(target_modules=["layer"]))
    with pytest.raises(ValueError, match="side='output' has no meaning on 'layer', a Embedding"):
        get_peft_model(OneLayer(nn.Embedding(8, 8)), RoadConfig(group_size=8, target_modules=["layer"]))


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_file_says_its_side(side: Any, tmp_path: Path) -> None:
    config = RoadConfig(group_size=4, side=side, target_modules=["layer"], init_weights=False)
    model, x = adapt(linear(True), config), torch.randn(3, 12)
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(linear(True), tmp_path).eval()
    assert loaded.peft_config["default"].side == side
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scale_multiplies_angles_and_what_scales_differ_from_one(variant: str) -> None:
    config = RoadConfig(variant=variant, group_size=8, target_modules=["layer"], init_weights=False)  # type: ignore[arg-type]
    model, x = adapt(linear(True), config), torch.randn(3, 12)
    layer, half = only(model), RoadOperator(24, 8, variant)
    own = layer.adapter("default")
    with torch.no_grad():
        half.angles.copy_(own.angles / 2)
        half.scales.copy_(1 + (own.scales - 1) / 2)
    layer.set_scale("default", 0.5)
    expected = (half.matrix() @ layer.host.weight).detach()
    assert relative_error(model(x), x @ expected.T + layer.host.module.bias) < 1e-6
    layer.set_scale("default", 0.0)
    assert torch.equal(model(x), linear(True)(x))


def test_scaled_rotations_have_a_mean_and_free_ones_have_none() -> None:
    config = RoadConfig(group_size=8, target_modules=["layer"])
    model = get_peft_model(linear(True), config, "a")
    model.add_adapter("b", config)
    for seed, name in enumerate("ab"):
        randomize(model, name, std=0.2, seed=seed)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    layer = only(model)
    a, b, mean = (layer.adapter(name).matrix().detach().double() for name in ("a", "b", "mean"))
    torch.testing.assert_close(mean @ mean, a @ b, rtol=1e-5, atol=1e-6)  # they commute, so this is their root
    config = RoadConfig(variant="road_2", group_size=8, target_modules=["layer"])
    free = get_peft_model(linear(True), config, "a")
    free.add_adapter("b", config)
    with pytest.raises(ValueError, match="RoadOperator with angles, scales has no mean"):
        free.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
