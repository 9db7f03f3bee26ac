"""What convolutions alone can get wrong: every shape, padding and group, against torch's own with the merged kernel.

The contract of every method on them is in test_contract.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn

from helpers import (
    EVERY_METHOD,
    ONE_OF_EACH_FORM,
    OPTIONS_FOR_12,
    OneLayer,
    as_trained,
    assert_equal_with_gradients,
    assert_gradients_are_right,
    assert_unchanged,
    layers_of,
    merged_matrix,
    only,
    randomize,
    relative_error,
    snapshot,
    trainable,
)
from isotune import get_peft_model
from isotune.hosts import ConvHost, host_for
from isotune.methods import METHODS
from isotune.tuner.layer import Layer
from isotune.tuner.placing import place_adapter


@dataclass(frozen=True)
class Case:
    """A convolution whose kernels have a multiple of 12 elements, and one sample for it."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]


CASES = {
    "1d": Case(lambda: nn.Conv1d(4, 8, 3), (4, 9)),
    "1d 1": Case(lambda: nn.Conv1d(12, 5, 1, bias=False), (12, 6)),
    "1d stride reflect": Case(lambda: nn.Conv1d(4, 7, 3, stride=2, padding=2, padding_mode="reflect"), (4, 10)),
    "1d groups same": Case(lambda: nn.Conv1d(8, 6, 6, groups=2, padding="same", dilation=2), (8, 11)),
    "2d": Case(lambda: nn.Conv2d(4, 8, 3), (4, 6, 5)),
    "2d not square": Case(lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), bias=False), (4, 7, 6)),
    "2d 1x1": Case(lambda: nn.Conv2d(12, 9, 1), (12, 3, 4)),
    "2d 1x1 stride": Case(lambda: nn.Conv2d(12, 9, 1, stride=2, bias=False), (12, 5, 4)),
    "2d same": Case(lambda: nn.Conv2d(6, 8, (3, 2), padding="same"), (6, 5, 6)),
    "2d valid dilation": Case(lambda: nn.Conv2d(4, 8, 3, padding="valid", dilation=(1, 2)), (4, 6, 7)),
    "2d reflect": Case(lambda: nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="reflect"), (4, 6, 5)),
    "2d circular": Case(lambda: nn.Conv2d(4, 8, (3, 2), padding="same", padding_mode="circular"), (4, 6, 5)),
    "2d replicate": Case(lambda: nn.Conv2d(4, 8, 3, padding=2, stride=2, padding_mode="replicate"), (4, 6, 5)),
    "2d groups": Case(lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1), (8, 5, 5)),
    "2d depthwise": Case(lambda: nn.Conv2d(6, 12, (3, 4), groups=6, bias=False), (6, 5, 6)),
    "3d": Case(lambda: nn.Conv3d(2, 5, (3, 2, 2), padding=(0, 1, 1)), (2, 4, 3, 3)),
    "3d 1x1x1": Case(lambda: nn.Conv3d(12, 5, 1, stride=(1, 2, 1)), (12, 2, 3, 2)),
    "3d reflect": Case(lambda: nn.Conv3d(2, 5, (3, 1, 2), padding=(1, 0, 1), padding_mode="reflect"), (2, 3, 2, 3)),
    "3d stride": Case(lambda: nn.Conv3d(3, 6, (2, 1, 2), stride=(2, 1, 3), dilation=(1, 2, 1)), (3, 5, 2, 6)),
    "3d groups circular": Case(
        lambda: nn.Conv3d(4, 6, (3, 2, 1), groups=2, padding=(1, 1, 0), padding_mode="circular", bias=False),
        (4, 4, 3, 2),
    ),
}
SOME = ["1d stride reflect", "2d not square", "2d groups", "3d"]
MORE = [*SOME, "2d 1x1", "2d circular", "2d depthwise", "3d groups circular"]


pytestmark = pytest.mark.covered


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(method: str, **options: Any) -> Any:
    return METHODS[method](**{"target_modules": ["layer"], "init_weights": False, **OPTIONS_FOR_12[method], **options})


def build(method: str, case: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return get_peft_model(OneLayer(CASES[case].build().to(dtype)), config(method, **options)).eval()


def batch_for(case: str, dtype: torch.dtype = torch.float32, count: int = 3) -> Tensor:
    return torch.randn(count, *CASES[case].sample, dtype=dtype)


def convolved(layer: Layer, x: Tensor, matrix: Tensor) -> Tensor:
    """What a copy of the base convolution gives with this matrix in the place of its weight."""
    plain = copy.deepcopy(layer.get_base_layer())
    kernel = matrix.reshape(plain.weight.shape).to(plain.weight.dtype)
    return torch.func.functional_call(plain, {"weight": kernel}, (x,))


# -- the host ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv1d(4, 6, 3), ConvHost),
        (nn.Conv2d(4, 6, (3, 2), groups=2), ConvHost),
        (nn.Conv3d(4, 6, (1, 3, 2)), ConvHost),
    ],
)
def test_matrix_is_a_view_with_a_row_for_each_output_channel(module: Any, kind: type) -> None:
    host = host_for(module, "x")
    assert type(host) is kind
    matrix = host.matrix()
    assert matrix.data_ptr() == module.weight.data_ptr()
    assert not matrix.requires_grad
    assert (host.out_features, host.in_features) == tuple(matrix.shape) == (6, module.weight[0].numel())
    for row, kernel in zip(matrix, module.weight, strict=True):
        assert torch.equal(row, kernel.reshape(-1))
    assert torch.equal(host.stored(matrix), module.weight)


def test_matrix_multiplies_the_patches() -> None:
    conv, x = nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2)), torch.randn(2, 4, 7, 6)
    patches = nn.functional.unfold(x, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2))
    expected = conv(x) - conv.bias[:, None, None]
    torch.testing.assert_close((host_for(conv).matrix() @ patches).view_as(expected), expected)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_set_and_restore(requires_grad: bool, channels_last: bool) -> None:
    module = nn.Conv2d(4, 6, (3, 2)).requires_grad_(requires_grad)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    host, original = host_for(module), module.weight
    kept = host.keep()
    values = original.detach().clone()
    for row, kernel in zip(host.matrix(), values, strict=True):
        assert torch.equal(row, kernel.reshape(-1))
    other = torch.randn(6, 24, dtype=torch.float64)
    host.set_matrix(other)
    assert module.weight is not original
    assert torch.equal(original, values)
    assert torch.equal(host.matrix(), other.float())
    assert module.weight.shape == original.shape
    assert module.weight.stride() == original.stride()
    assert module.weight.requires_grad is requires_grad
    host.restore(kept)
    assert module.weight is original


class Custom(nn.Conv2d):
    """A subclass with a plain weight, as libraries have."""


def test_subclasses_are_taken() -> None:
    assert isinstance(host_for(Custom(4, 6, 3)), ConvHost)


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3), nn.LSTM(12, 6), nn.BatchNorm2d(4)],
    ids=lambda module: type(module).__name__,
)
def test_others_are_refused_and_the_model_is_left_alone(method: str, module: nn.Module) -> None:
    model = OneLayer(module)
    before = snapshot(model)
    kind = type(module).__name__
    with pytest.raises(ValueError, match=rf"'layer' is a .*\.{kind}, which cannot.*Supported: .*exclude_modules"):
        get_peft_model(model, config(method))
    assert_unchanged(model, before)


def test_weights_that_are_no_floating_kernel_are_refused() -> None:
    module = nn.Conv2d(4, 6, 3)
    module.weight = nn.Parameter(torch.zeros(6, 36, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'some\.name'.*shape.*dtype"):
        host_for(module, "some.name")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("psoft", {"psoft_dropout": 0.1}), "psoft_dropout=0.1.*Conv2d.*0"),
        (("psoft", {"r": 9}), "r=9.*8 × 36.*at most 8"),
        (("oft", {"oft_block_size": 5}), "oft_block_size=5.*36.*4 or 6"),
        (("boft", {"boft_n_butterfly_factor": 3}), "boft_n_butterfly_factor=3.*36"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: tuple[str, dict[str, Any]], message: str) -> None:
    model = OneLayer(nn.Conv2d(4, 8, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(options[0], **options[1]))
    assert_unchanged(model, before)


# -- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_convolution_with_the_merged_kernel(method: str, case: str) -> None:
    model, x = build(method, case), batch_for(case)
    layer = only(model)
    found, expected = model(x), convolved(layer, x, merged_matrix(layer))
    assert found.shape == layer.get_base_layer()(x).shape
    assert relative_error(layer.get_base_layer()(x), expected) > 1e-2  # so the adapter does something
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(model(x[1]), expected[1], rtol=1e-5, atol=2e-6)  # without a batch dimension
    assert model(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("case", MORE)
def test_merge_and_unmerge(method: str, case: str) -> None:
    model, x = build(method, case), batch_for(case)
    layer = only(model)
    original, bits = layer.host.weight, layer.host.weight.detach().clone()
    expected, matrix = model(x), merged_matrix(layer)
    delta = layer.get_delta_weight("default")
    model.merge_adapter()
    assert layer.host.weight is not original
    torch.testing.assert_close(layer.host.matrix(), matrix.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.host.weight, bits + delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=2e-6)
    model.unmerge_adapter()
    assert layer.host.weight is original
    assert torch.equal(original, bits)
    assert torch.equal(model(x), expected)
    plain = model.merge_and_unload()
    assert type(plain.layer) is type(CASES[case].build())
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["1d", "2d groups", "2d reflect", "3d"])
def test_half_precision_rounds_the_kernel_once(method: str, case: str, dtype: torch.dtype) -> None:
    model, x = build(method, case, dtype), batch_for(case, dtype)
    layer, wide = only(model), merged_matrix(only(model)).detach()
    if layer.adapter("default").additive:  # its reader and writer are of the weight's dtype
        up, down = layer.low_rank("default")
        wide = layer.host.matrix().float() + up @ down
    found = model(x)
    assert found.dtype == dtype
    assert {p.dtype for p in layer.adapter("default").parameters()} == {torch.float32}
    step = torch.finfo(dtype).eps
    assert relative_error(found, convolved(layer, x, wide)) < step
    layer.merge()
    assert layer.host.weight.dtype == dtype
    # At most half a step of the exact value: nothing was rounded before the end.
    error = (layer.host.matrix().double() - wide.double()).abs()
    assert bool((error <= 0.51 * step * wide.abs().double() + 1e-6).all())
    assert torch.equal(layer(x), found)


def test_autocast_rounds_the_kernel_once(method: str) -> None:
    model, x = build(method, "2d"), batch_for("2d")
    matrix = merged_matrix(only(model)).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = model(x), convolved(only(model), x, matrix)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative_error(found, expected) < 1e-3


def test_hooks_of_the_host_run(method: str) -> None:
    model, x = build(method, "2d"), batch_for("2d")
    expected, calls = model(x), []
    only(model).get_base_layer().register_forward_hook(lambda _, given, output: calls.append(given[0]) or 2 * output)
    torch.testing.assert_close(model(x), 2 * expected)
    assert calls[0] is x


def test_the_update_of_a_layer_that_another_tuner_has_wrapped_is_kept(method: str) -> None:
    base = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), OneLayer(nn.Conv2d(4, 8, 3, padding=1))
    )
    x, plain = batch_for("2d"), base.layer.get_base_layer()
    lora = (base(x) - plain(x)).detach()
    assert relative_error(plain(x) + lora, plain(x)) > 1e-2
    layer = Layer(base.layer, "layer")
    layer.update_layer("default", config(method))
    place_adapter("default", [layer])
    expected = convolved(layer, x, merged_matrix(layer)) + lora
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build_layer", [lambda: nn.Conv1d(6, 4, 2, padding=1), lambda: nn.Conv2d(4, 4, (3, 1), groups=1)]
)
def test_gradcheck(method: str, build_layer: Callable[[], nn.Module]) -> None:
    layer = build_layer().double()
    model = get_peft_model(OneLayer(layer), config(method))
    x = torch.randn(1, layer.in_channels, *(3,) * (layer.weight.ndim - 2), dtype=torch.float64, requires_grad=True)
    parameters = trainable(model)

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values[1:], strict=True)), (values[0],))

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert_gradients_are_right(function, x, *values)


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("case", ["1d stride reflect", "2d reflect", "2d replicate", "3d reflect", "3d stride"])
def test_gradients_equal_those_of_the_convolution_with_the_merged_kernel(method: str, case: str) -> None:
    """What is padded by its own values has them in several places, and a stride leaves some values out."""
    model = as_trained(method, OneLayer(CASES[case].build().double()), "layer").double()
    layer, x = only(model), batch_for(case, torch.float64).requires_grad_()
    expected = convolved(layer, x, merged_matrix(layer))
    assert relative_error(layer.get_base_layer()(x), expected) > 1e-2
    assert_equal_with_gradients(model(x), expected, [x, *trainable(model).values()])


def test_a_trained_bias_gets_its_gradient(method: str) -> None:
    model, x = build(method, "2d"), batch_for("2d")
    bias = only(model).get_base_layer().bias.requires_grad_()
    output = model(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    torch.testing.assert_close(bias.grad, cotangent.sum((0, 2, 3)))


# -- files ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions of all three dimensions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding="same", padding_mode="circular")
        self.second = nn.Conv2d(12, 12, (3, 2), groups=3, stride=2)
        self.third = nn.Conv1d(12, 8, 3, padding=1)
        self.fourth = nn.Conv3d(4, 8, (1, 3, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x))).flatten(2)
        x = torch.tanh(self.third(torch.tanh(x)))
        return self.head(self.fourth(x.view(len(x), 4, 2, -1, 1)).flatten(2).mean(2))


def net() -> nn.Module:
    torch.manual_seed(3)
    return Net()


@pytest.mark.parametrize(
    ("kind", "options"), [*((name, {}) for name in METHODS), ("psoft", {"basis": "embedded"})], ids=str
)
def test_save_and_load(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    targets = ["first", "second", "third", "fourth"]
    x = torch.randn(2, 4, 8, 7)
    model = get_peft_model(net(), config(kind, target_modules=targets, init_weights=True, **options)).eval()
    base = model(x)
    randomize(model, std=0.3)
    expected = model(x)
    assert relative_error(base, expected) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert len(layers_of(loaded)) == 4
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert layers_of(merged) == []
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_finds_a_teacher(method: str) -> None:
    """The loss to a model with a random adapter of the same method falls, and nothing frozen moves."""
    options = config(method, target_modules=["first", "second", "third"], init_weights=True)
    torch.manual_seed(0)
    teacher = get_peft_model(net(), copy.deepcopy(options))
    randomize(teacher, std=0.5)
    torch.manual_seed(0)  # so that random parts of the start are the same
    model = get_peft_model(net(), options)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    x = torch.randn(16, 4, 8, 7)
    with torch.no_grad():
        target = teacher(x)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
