"""Weights of the base that change under an adapter are never passed over, and those that only move are not mistaken."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from helpers import (
    EMBEDDED,
    EVERY_METHOD,
    FEW,
    HOSTS_OF_12,
    SUBSPACES,
    UPDATES,
    Chain,
    OneLayer,
    as_trained,
    configured,
    counted,
    error_of_update,
    move,
    only,
    relative_error,
    seeded_host,
    with_basis,
)
from isotune import get_peft_model
from isotune.errors import BaseMismatchError

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(
        method=FEW,
        host=("linear", "conv2d", "embedding"),
        moved=(
            "half",
            "bfloat16 twice",
            "double, swapped",
            "deepcopy",
            "pickle",
            "its own state, assigned",
            "merged, cast and back",
        ),
    ),
]


@torch.no_grad()
def scaled(layer: Any, other: Any) -> None:
    layer.weight.mul_(3)


def scaled_through_data(layer: Any, other: Any) -> None:
    layer.weight.data.mul_(3)


def scaled_through_numpy(layer: Any, other: Any) -> None:
    layer.weight.detach().numpy()[...] *= 3


@torch.no_grad()
def copied(layer: Any, other: Any) -> None:
    layer.weight.copy_(other.weight)


def one_row_through_data(layer: Any, other: Any) -> None:
    layer.weight.data[1] += 3


def copied_through_data(layer: Any, other: Any) -> None:
    layer.weight.data.copy_(other.weight.data)


def data_exchanged(layer: Any, other: Any) -> None:
    layer.weight.data = other.weight.detach().clone()


def loaded(layer: Any, other: Any) -> None:
    layer.load_state_dict(other.state_dict())


def assigned(layer: Any, other: Any) -> None:
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def replaced(layer: Any, other: Any) -> None:
    layer.weight = nn.Parameter(other.weight.detach().clone(), requires_grad=False)


SAME_SUBSPACE = [scaled, scaled_through_data, scaled_through_numpy]
CHANGES = [
    *SAME_SUBSPACE,
    one_row_through_data,
    copied,
    copied_through_data,
    data_exchanged,
    loaded,
    assigned,
    replaced,
]
MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("basis", ["embedded", "pinned"])
def test_a_changed_base_gives_what_loading_on_it_gives(
    method: str, host: str, change: Any, mode: str, used: bool, basis: str, tmp_path: Path
) -> None:
    options = with_basis(method, basis)
    plain, x = seeded_host(host), HOSTS_OF_12[host][1]()
    model = as_trained(method, seeded_host(host), "layer", **options)
    model.save_pretrained(tmp_path)
    other = seeded_host(host, seed=7).layer
    change(plain.layer, other)
    with MODES[mode]():
        if used:
            model(x)
        change(only(model).get_base_layer(), other)
        if method in SUBSPACES and basis == "pinned" and change not in SAME_SUBSPACE:
            with pytest.raises(BaseMismatchError):
                model(x)
            return
        base = plain(x)
        expected = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()(x)
        for _ in range(2):
            assert error_of_update(model(x), expected, base) < 1e-3
    model.merge_adapter()
    assert error_of_update(model(x), expected, base) < 1e-3
    model.unmerge_adapter()
    assert torch.equal(only(model).host.weight, plain.layer.weight)


@pytest.mark.parametrize("host", HOSTS_OF_12)
def test_a_weight_that_is_stored_transposed_is_seen_to_change(method: str, host: str, tmp_path: Path) -> None:
    plain, x = seeded_host(host), HOSTS_OF_12[host][1]()
    model = as_trained(method, seeded_host(host), "layer", **with_basis(method, "embedded"))
    layer = only(model).get_base_layer()
    layer.weight.data = layer.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    model.save_pretrained(tmp_path)
    model(x)
    for one in (plain.layer, layer):
        one.weight.data.mul_(3)
    expected = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()(x)
    assert error_of_update(model(x), expected, plain(x)) < 1e-3


def test_a_weight_of_one_row_repeated_can_be_adapted(method: str) -> None:
    base = OneLayer(nn.Linear(12, 12))
    base.layer.weight = nn.Parameter(torch.randn(1, 12).expand(12, 12), requires_grad=False)
    x = torch.randn(5, 12)
    expected = base(x).detach()
    model = get_peft_model(
        base, configured(method, ["layer"], r=1) if method in SUBSPACES else configured(method, ["layer"])
    )
    assert relative_error(model(x), expected) < 1e-5


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("how", ["parametrised", "called with"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_that_is_put_in_the_place_of_the_bases_counts(
    method: str, host: str, how: str, grad: bool, tmp_path: Path
) -> None:
    """It is no parameter of the layer, and another tensor in every pass."""
    plain, x = seeded_host(host), HOSTS_OF_12[host][1]()
    model = as_trained(method, seeded_host(host), "layer", **with_basis(method, "embedded"))
    model.save_pretrained(tmp_path)
    before, layer = model(x), only(model).get_base_layer()
    scaled(plain.layer, None)
    expected = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()(x)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            if how == "called with":
                name = next(n for n, p in model.named_parameters() if p is layer.weight)
                found = functional_call(model, {name: 3 * layer.weight.detach()}, (x,))
                torch.testing.assert_close(model(x), before)
            else:
                parametrize.register_parametrization(layer, "weight", Tripled())
                if "conv" in host:
                    with pytest.raises(ValueError, match="it is computed from others"):
                        model(x)
                    return
                found = model(x)
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            assert error_of_update(found, expected, plain(x)) < 1e-3


def exchange(layer: Any, module: nn.Module, how: str) -> None:
    """As code does that converts a model in place, such as torchao's for training in float8."""
    if how == "set":
        layer.base_layer = module
    else:
        layer._modules["base_layer"] = module


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("how", ["set", "in the table"])
@pytest.mark.parametrize("called", [True, False])
def test_a_layer_exchanged_for_another_is_adapted(
    method: str, host: str, how: str, called: bool, tmp_path: Path
) -> None:
    plain, x = seeded_host(host), HOSTS_OF_12[host][1]()
    model = as_trained(method, seeded_host(host), "layer", **with_basis(method, "embedded"))
    model.save_pretrained(tmp_path)
    plain.layer = seeded_host(host, seed=7).layer
    exchange(only(model), copy.deepcopy(plain.layer), how)
    base = plain(x)
    expected = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()(x)
    if called:
        assert error_of_update(model(x), expected, base) < 1e-3
    model.merge_adapter()
    assert error_of_update(model(x), expected, base) < 1e-3
    model.unmerge_adapter()
    assert torch.equal(only(model).host.weight, plain.layer.weight)
    assert error_of_update(model(x), expected, base) < 1e-3
    assert error_of_update(model.merge_and_unload()(x), expected, base) < 1e-3


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            nn.Identity(),
            "cannot act on the layer that is there now: it was exchanged for a torch.nn.modules.linear.Identity",
        ),
        (nn.Linear(12, 24), r"is \(24, 12\) and not \(20, 12\), as its adapters are: it was exchanged for a torch.nn"),
    ],
)
def test_a_layer_exchanged_for_what_cannot_be_adapted_is_refused(method: str, module: nn.Module, said: str) -> None:
    model = as_trained(method, seeded_host("linear"), "layer")
    layer, x = only(model), torch.randn(5, 12)
    before, expected = layer.base_layer, model(x)
    layer.base_layer = module
    for act in (model.merge_adapter, lambda: model(x)):
        with pytest.raises(ValueError, match=said):
            act()
    assert not layer.merged_adapters
    layer.base_layer = before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", ["merged", "merged by layer", "copied and merged", "delta", "low rank", "weight"])
def test_a_changed_base_is_seen_by_what_reads_the_adapter(method: str, change: Any, read: str, tmp_path: Path) -> None:
    """No pass of the model has run since."""
    if read == "low rank" and method not in (*UPDATES, "hra"):
        pytest.skip("of full rank")
    options = {"basis": "embedded"} if method in SUBSPACES else {}
    plain, x = seeded_host("linear"), torch.randn(5, 12)
    model = as_trained(method, seeded_host("linear"), "layer", **options)
    model.save_pretrained(tmp_path)
    other = seeded_host("linear", seed=7).layer
    for layer in (plain.layer, only(model).get_base_layer()):
        change(layer, other)
    base = plain(x)
    expected = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()(x)
    layer = only(model)
    weight, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
    if read == "merged":
        found = model.merge_and_unload()(x)
    elif read == "merged by layer":
        layer.merge()
        found = model(x)
    elif read == "copied and merged":
        found = copy.deepcopy(model).merge_and_unload()(x)
    elif read == "delta":
        found = nn.functional.linear(x, weight + layer.get_delta_weight("default"), bias)
    elif read == "low rank":
        up, down = layer.low_rank("default")
        found = nn.functional.linear(x, weight + up @ down, bias)
    else:
        found = nn.functional.linear(x, layer.weight, bias)
    assert error_of_update(found, expected, base) < 1e-3


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_changed_base_is_seen_by_a_layer_alone(method: str, change: Any, grad: bool, tmp_path: Path) -> None:
    options = {"basis": "embedded"} if method in SUBSPACES else {}
    plain, x = Chain(), torch.randn(5, 24)
    model = as_trained(method, **options)
    model.save_pretrained(tmp_path)
    layer, other = model.get_base_model().layers[1], Chain(seed=7).layers[1]
    for one in (plain.layers[1], layer.get_base_layer()):
        change(one, other)
    base = plain.layers[1](x)
    expected = PeftModel.from_pretrained(plain, tmp_path).eval().get_base_model().layers[1](x)
    with torch.set_grad_enabled(grad):
        assert error_of_update(layer(x), expected, base) < 1e-3


@pytest.mark.parametrize("host", ["linear", "conv2d", "embedding"])
def test_the_old_base_put_back_after_a_refusal(method: str, host: str) -> None:
    if method not in SUBSPACES or method in EMBEDDED:
        pytest.skip("a rotation fits any base, and so does a stored subspace")
    model, x = as_trained(method, seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    expected, layer = model(x).detach(), only(model).get_base_layer()
    weight = layer.weight.detach().clone()
    copied(layer, seeded_host(host, seed=7).layer)
    for _ in range(2):  # not only the first time
        with pytest.raises(BaseMismatchError):
            model(x)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert relative_error(model(x).detach(), expected) < 1e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inner", [True, False])
def test_another_base_under_an_untrained_adapter_moves_its_subspace(method: str, mode: Any, inner: bool) -> None:
    if method not in SUBSPACES:
        pytest.skip("a rotation has no subspace")
    x = torch.randn(5, 12)
    with mode():
        with torch.random.fork_rng():
            torch.manual_seed(1)  # as `as_trained`: some methods start at random
            model = get_peft_model(Chain(), configured(method))
        for i, layer in enumerate(Chain(seed=7).layers):
            if inner:
                model.get_base_model().layers[i].get_base_layer().load_state_dict(layer.state_dict())
                continue
            prefix = f"base_model.model.layers.{i}.base_layer."
            model.load_state_dict({prefix + name: value for name, value in layer.state_dict().items()}, strict=False)
        if inner:
            model(x)  # the moment at which what nobody told of can be seen
        found = move(model)(x)
        expected = as_trained(method, Chain(seed=7))(x)
        assert error_of_update(found, expected, Chain(seed=7)(x)) < 1e-3


# -- what is no change -------------------------------------------------------------------------------------------------


def _torch_saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _own_state(model: Any) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def _own_state_assigned(model: Any) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


def _base_state_assigned(model: Any) -> Any:
    for layer in model.get_base_model().layers:
        layer.get_base_layer().load_state_dict(copy.deepcopy(layer.get_base_layer().state_dict()), assign=True)
    return model


def _merged_and_back(model: Any) -> Any:
    model.merge_adapter()
    model = model.half().float()
    model.unmerge_adapter()
    return model


def _trainable(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(torch.randn(2, 12)).sum().backward()
    model.requires_grad_(False)
    return model


def _swapped(model: Any) -> Any:
    """As torch moves parameters of torchao's and DTensors, to which nothing may hold a weak reference."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "half and back": lambda model: model.half().float(),
    "bfloat16": lambda model: model.bfloat16(),
    "bfloat16 twice": lambda model: model.bfloat16().float().bfloat16().float(),
    "double": lambda model: model.double(),
    "double, half": lambda model: model.double().half(),
    "double, swapped": _swapped,
    "to the same device": lambda model: model.to("cpu"),
    "deepcopy": copy.deepcopy,
    "deepcopy in half": lambda model: copy.deepcopy(model).half(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle in bfloat16": lambda model: pickle.loads(pickle.dumps(model.bfloat16())),
    "torch.save": _torch_saved,
    "shared memory": lambda model: model.share_memory(),
    "its own state": _own_state,
    "its own state, assigned": _own_state_assigned,
    "the base's own state, assigned": _base_state_assigned,
    "base alone in half": lambda model: (model.get_base_model().half(), model)[1],
    "merged, cast and back": _merged_and_back,
    "gradients switched": _trainable,
    "train and eval": lambda model: model.train().eval(),
}


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("basis", ["embedded", "pinned"])
@pytest.mark.parametrize("moved", MOVES)
def test_a_moved_or_copied_base_is_not_taken_for_another(
    method: str, moved: str, used: bool, basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = with_basis(method, basis)
    model, x = as_trained(method, **options), torch.randn(5, 12)
    expected, base = afresh_output(model, x)
    if used:
        model(x)
    with counted(monkeypatch, "isotune.tuner.placing.principal_subspaces") as solved:
        model = MOVES[moved](model)
        dtype = next(p.dtype for n, p in model.named_parameters() if "base_layer" in n)
        with torch.no_grad():
            found = model(x.to(dtype))
        model(x.to(dtype).requires_grad_()).sum().backward()
    assert not solved
    rounded = any(name in moved for name in ("half", "16", "cast"))
    assert error_of_update(found, expected, base) < (0.1 if rounded else 1e-5)


@torch.no_grad()
def afresh_output(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a copy of the model gives, and its base."""
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        base = twin(x)
    return twin(x), base


@pytest.mark.parametrize("basis", ["embedded", "pinned"])
def test_one_layer_of_a_model_is_replaced_by_a_copy(method: str, basis: str) -> None:
    """As pruning and surgery do: the layer comes from a model of the same weights."""
    options = with_basis(method, basis)
    model, x = as_trained(method, **options), torch.randn(5, 12)
    expected = model(x).detach()
    layers = model.get_base_model().layers
    layers[1] = copy.deepcopy(layers[1])
    assert relative_error(model(x).detach(), expected) < 1e-5
    layers[1].adapter("default").randomize_parameters()
    moved = model(x).detach()
    assert relative_error(moved, expected) > 1e-3
    assert relative_error(moved, copy.deepcopy(model)(x).detach()) < 1e-5


def test_the_base_dtype_is_kept_where_peft_is_told_so(method: str) -> None:
    """autocast_adapter_dtype=False; the evaluation stays in float32."""
    base = OneLayer(nn.Linear(12, 20)).bfloat16()
    model = get_peft_model(base, configured(method, ["layer"]), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    move(model).eval()
    wide = copy.deepcopy(model).float()
    x = torch.randn(6, 12).bfloat16()
    y = model(x)
    assert relative_error(y.detach().float(), wide(x.float()).detach()) < 2e-2
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)


def emptied(model: Any) -> None:
    """With NaN in what nothing is written to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)


def zeroed(model: Any) -> None:
    """As `to_empty` leaves large tensors."""
    model._apply(torch.zeros_like)


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("empty", [emptied, zeroed])
@pytest.mark.parametrize("basis", ["embedded", "pinned"])
def test_a_model_in_use_is_emptied_and_loaded(method: str, host: str, empty: Any, basis: str) -> None:
    x = HOSTS_OF_12[host][1]()
    model = as_trained(method, seeded_host(host), "layer", **with_basis(method, basis)).eval()
    with torch.no_grad():
        expected, state = model(x), copy.deepcopy(model.state_dict())
        empty(model)
        model.load_state_dict(state)
        assert error_of_update(model(x), expected, seeded_host(host)(x)) < 1e-3
