"""Weighted means of adapters: exact at the ends, of the same kind between, refused where they make no sense."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from helpers import Stack, down_of, layers_of, psoft, randomize, relative_error
from isotune import add_adapter, get_peft_model
from isotune.diagnostics.geometry import orthogonality_error
from isotune.errors import IsotuneWarning
from isotune.methods import METHODS
from isotune.methods.config import IsotuneConfig

TARGETS = ["first", "second", "third"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "psoft": ("psoft", {"r": 8}),
    "psoft-strict": ("psoft", {"r": 6, "psoft_mag_a": False, "psoft_mag_b": False}),
    "psoft-scaled": ("psoft", {"r": 8, "ab_svd_init": "pissa_init", "basis": "embedded"}),
    "psoft-series": ("psoft", {"r": 8, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}),
    "psoft-free": ("psoft", {"r": 5, "psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}),
    "lora_xs": ("lora_xs", {"r": 8}),
    "oft": ("oft", {"oft_block_size": 8}),
    "coft": ("oft", {"oft_block_size": 8, "coft": True, "eps": 0.05, "block_share": True}),
    "boft": ("boft", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "goft": ("goft", {}),
}


def config(method: str, **options: Any) -> IsotuneConfig:
    return METHODS[method](**{"target_modules": TARGETS, **options})


def pair(method: str, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = get_peft_model(Stack(dtype=dtype), config(method, **options), "a")
    model.add_adapter("b", config(method, **options))
    for seed, name in enumerate(("a", "b")):
        randomize(model, name, std=0.2, seed=seed)
    return model.eval()


def output(model: PeftModel, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model.set_adapter(name)
    x = torch.linspace(-2, 2, 5 * 24, dtype=dtype).reshape(5, 24)
    with torch.no_grad():
        result: torch.Tensor = model(x)
    return result


@pytest.mark.parametrize("case", CASES)
def test_the_ends_are_the_adapters_and_nothing_is_the_base(case: str) -> None:
    method, options = CASES[case]
    model = pair(method, **options)
    with torch.no_grad(), model.disable_adapter():
        base = model(torch.linspace(-2, 2, 5 * 24).reshape(5, 24))
    for weights, name in (([1.0, 0.0], "a"), ([0.0, 1.0], "b")):
        model.add_weighted_adapter(["a", "b"], weights, f"only-{name}")
        assert relative_error(output(model, f"only-{name}"), output(model, name)) < 1e-6
    model.add_weighted_adapter(["a", "b"], [0.0, 0.0], "none")
    assert relative_error(output(model, "none"), base) < 1e-6
    model.add_weighted_adapter(["a"], [0.5], "half-a")
    whole, half = (relative_error(output(model, name), base) for name in ("a", "half-a"))
    assert 0.2 * whole < half < 0.9 * whole


@pytest.mark.parametrize("case", CASES)
def test_orthomerge_keeps_the_magnitude_and_what_is_equal(case: str) -> None:
    method, options = CASES[case]
    model = pair(method, **options)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="orthomerge")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "only-a", combination_type="orthomerge")
    assert relative_error(output(model, "only-a"), output(model, "a")) < 1e-6
    for layer in layers_of(model):
        for name, own in layer.adapter("mean").named_parameters():
            if name in ("input_scale", "output_scale", "output_gain") or case in ("coft", "psoft-series"):
                continue  # magnitudes, and generators of which only a bounded part acts
            norms = [layer.adapter(other).get_parameter(name).norm() for other in ("a", "b")]
            torch.testing.assert_close(own.norm(), sum(norms) / 2)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.adapter("b").load_state_dict(layer.adapter("a").state_dict())
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "same", combination_type="orthomerge")
    assert relative_error(output(model, "same"), output(model, "a")) < 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("psoft-free", "lora_xs", "psoft-series")])
def test_what_is_between_is_as_orthogonal(case: str) -> None:
    method, options = CASES[case]
    model = pair(method, torch.float64, **options)
    model.add_weighted_adapter(["a", "b"], [0.4, 0.6], "mean")
    for layer in layers_of(model):
        operator = layer.adapter("mean")
        if method == "psoft":
            (difference,) = operator.evaluate({"generator": operator.generator})
            matrix = difference + torch.eye(len(difference), dtype=difference.dtype)
        else:
            matrix = operator.matrix()
        assert orthogonality_error(matrix.detach()) < 1e-12
    for name in ("a", "b"):
        assert relative_error(output(model, "mean", torch.float64), output(model, name, torch.float64)) > 1e-3


@pytest.mark.parametrize("case", ["psoft-free", "lora_xs"])
def test_free_matrices_sum(case: str) -> None:
    method, options = CASES[case]
    model = pair(method, **options)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    for layer in layers_of(model):
        expected = 0.7 * layer.get_delta_weight("a") - 0.4 * layer.get_delta_weight("b")
        assert relative_error(layer.get_delta_weight("sum"), expected) < 1e-5


def test_magnitudes_multiply() -> None:
    model = pair("psoft", r=8)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    for layer in layers_of(model):
        a, b, mean = (layer.adapter(name) for name in ("a", "b", "mean"))
        torch.testing.assert_close(mean.input_scale, (a.input_scale * b.input_scale).sqrt())


def test_the_mean_shares_the_basis_and_lives_like_any_adapter(tmp_path: Path) -> None:
    pair("psoft", r=8).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(stack(), str(tmp_path / "a"), "a").eval()
    model.load_adapter(str(tmp_path / "b"), "b")
    before = {name: output(model, name) for name in ("a", "b")}
    model.set_adapter("a")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    for layer in layers_of(model):
        assert layer.adapter("mean").placement.down is layer.adapter("a").placement.down
        assert layer.active_adapters == ["a"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mean." in n)
    expected = output(model, "mean")
    for name, right in before.items():
        assert torch.equal(output(model, name), right)
    model.save_pretrained(str(tmp_path / "saved"), selected_adapters=["mean"])
    again = PeftModel.from_pretrained(stack(), str(tmp_path / "saved/mean"), "mean").eval()
    assert relative_error(output(again, "mean"), expected) < 1e-5
    model.delete_adapter("a")
    assert torch.equal(output(model, "mean"), expected)


def stack() -> Stack:
    """The base of `pair`, whose seed is that at the beginning of a test."""
    torch.manual_seed(0)
    return Stack()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 5}, r"'a' and 'b' have different sizes \(r = \d and r = 5\) in .*'first'"),
    "options": ({"use_cayley_neumann": True}, "different options"),
    "split": ({"ab_svd_init": "pissa_init"}, "different options .*split"),
    "kind": ({"basis": "embedded"}, "different options .*basis"),
    "seed": ({"basis_seed": 5}, "different bases"),
    "modules": ({"target_modules": ["first"]}, r"'b' does not adapt '.*second'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_is_named(case: str) -> None:
    options, message = REFUSED[case]
    model = get_peft_model(Stack(), psoft(target_modules=TARGETS), "a")
    model.add_adapter("b", psoft(**{"target_modules": TARGETS, **options}))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    assert list(model.peft_config) == ["a", "b"]
    assert not any("mean" in name for name, _ in model.named_modules())


def test_other_bases_methods_and_requests_are_refused() -> None:
    model = pair("psoft", r=8)
    with torch.no_grad():
        layer = layers_of(model)[1]
        turned, (basis,) = down_of(layer, "b").flip(0), layer.bases("b")
        basis.record(basis.stored.flip(0))
        layer.put_on_basis("b", [turned], principal=False)
    with pytest.raises(ValueError, match=r"different bases of the principal subspace .* 'second'"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    add_adapter(model, "rotation", config("oft", oft_block_size=8))
    for adapters, weights, name, message in (
        (["a", "rotation"], [1, 1], "m", "different methods.*ISOTUNE_OFT"),
        (["a", "missing"], [1, 1], "m", "this model has"),
        (["a", "a"], [1, 1], "m", "each once"),
        ([], [], "m", "at least one"),
        (["a"], [1, 1], "m", "one finite number for each of the 1"),
        (["a"], [float("nan")], "m", "finite"),
        (["a"], [1.0], "b", "already"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(adapters, weights, name)
    with pytest.raises(ValueError, match="combination_type='svd' is not one of 'rotation', 'orthomerge'"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "m", combination_type="svd")
    with pytest.raises(ValueError, match=r"'a', 'b' cannot be combined in .*first'.*weights below 0"):
        model.add_weighted_adapter(["a", "b"], [1.5, -0.5], "m", combination_type="orthomerge")
    layers_of(model)[0].adapter("a").input_scale.data[0] = -1.0
    with pytest.raises(ValueError, match=r"'a' cannot be combined in .*first'.*not above 0"):
        model.add_weighted_adapter(["a"], [0.5], "m")
    assert list(model.peft_config) == ["a", "b", "rotation"]


def test_saved_modules_are_not_averaged() -> None:
    model = get_peft_model(Stack(), psoft(target_modules=["first"], modules_to_save=["third"]), "a")
    with pytest.raises(ValueError, match=r"'a' has modules_to_save=\['third'\]"):
        model.add_weighted_adapter(["a"], [0.5], "mean")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hra", {"r": 4, "apply_GS": True, "init_weights": False}),
        ("qgoft", {}),
        ("psoft", {"r": 4, "psoft_orth": False}),
    ],
)
def test_methods_without_a_mean_are_refused(method: str, options: dict[str, Any]) -> None:
    model = pair(method, **options)
    with pytest.raises(ValueError, match="has no mean of the same form"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")


def test_reflections_have_the_nearest_of_their_kind_and_say_how_near() -> None:
    model = pair("hra", torch.float64, r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["a", "b"], [0.0, 1.0], "only-b")
        model.add_weighted_adapter(["a", "b"], [0.0, 0.0], "none")
        model.add_weighted_adapter(["a"], [0.5], "half-a")
    assert relative_error(output(model, "only-b", torch.float64), output(model, "b", torch.float64)) < 1e-12
    for layer in layers_of(model):
        half, whole = (layer.adapter(name).matrix() for name in ("half-a", "a"))
        torch.testing.assert_close(half @ half, whole)
        assert float((layer.adapter("none").matrix() - torch.eye(len(whole), dtype=whole.dtype)).norm()) < 1e-12
    with pytest.warns(IsotuneWarning, match=r"differs from it by \d+\.\d% of all that it changes") as warned:
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    missing, norm = 0.0, 0.0
    for layer in layers_of(model):
        a, b, found = (layer.adapter(name).matrix().detach() for name in ("a", "b", "mean"))
        mean = torch.matrix_exp((logarithm(a) + logarithm(b)) / 2)
        missing += float((mean - found).square().sum())
        norm += float((mean - torch.eye(len(mean), dtype=mean.dtype)).square().sum())
    said = float(str(warned[0].message).split("by ")[1].split("%")[0])
    assert said == pytest.approx(100 * (missing / norm) ** 0.5, abs=0.06)


def logarithm(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eig(matrix)
    return (vectors @ torch.diag_embed(values.log()) @ torch.linalg.inv(vectors)).real


def test_a_half_turn_by_reflections_has_no_mean() -> None:
    model = pair("hra", r=2)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.adapter("a").vectors.copy_(torch.eye(2, layer.in_features))
    with pytest.raises(ValueError, match=r"'a' cannot be combined in .*half a turn, whose direction is open"):
        model.add_weighted_adapter(["a"], [0.5], "mean")
