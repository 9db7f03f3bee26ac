"""Code that reads a layer's weight and does not call the layer gets the adapted weight, with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import (
    DROPOUT,
    EVERY_METHOD,
    FEW,
    as_trained,
    assert_gradients_are_right,
    assert_writing_is_refused,
    error_of_update,
    layers_of,
    relative_error,
    trainable,
)

pytestmark = [
    pytest.mark.parametrize("method", EVERY_METHOD),
    pytest.mark.covered(method=FEW),
]


class Attention(nn.Module):
    """Gives its projections' weights to torch's attention, as WavLM does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, bias = x.transpose(0, 1), torch.cat([self.q.bias, self.k.bias, self.v.bias])
        given = (x, x, x, 12, 2, None, bias, None, None, False, 0.0, self.out.weight, self.out.bias)
        more = {"q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
        return F.multi_head_attention_forward(*given, use_separate_proj_weight=True, **more)[0]


class Step(nn.Module):
    """Multiplies by the weight of a projection, as state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.step.weight @ x.transpose(1, 2) + self.step.bias[:, None]).cumsum(-1)


class Tied(nn.Module):
    """Reads its output's weight off its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 12)

    def forward(self, x: Tensor) -> Tensor:
        # Without something between, a rotation of both would cancel.
        return F.linear(torch.tanh(self.embed(x[..., 0].abs().mul(3).long())), self.embed.weight)


class Parts(nn.Module):
    """Uses parts of weights: rows of one, a norm, a concatenation, a convolution's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.conv = nn.Linear(12, 12), nn.Linear(12, 12), nn.Conv1d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = F.linear(x, torch.cat([self.q.weight, self.k.weight[:6]]))
        scaled = F.linear(x, F.normalize(self.q.weight, dim=-1)) * self.k.weight.norm()
        return torch.cat([both, scaled, F.conv1d(x.mT, self.conv.weight).mT], -1)


def encoder() -> nn.Module:
    """In evaluation the fast path of torch's own encoder layers reads the weights of linear1 and linear2."""
    return nn.Sequential(*(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0) for _ in range(2)))


PARENTS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "encoder": (encoder, ("linear1", "linear2")),
    "attention": (Attention, ("q", "v", "out")),
    "step": (Step, ("step",)),
    "tied embedding": (Tied, ("embed",)),
    "parts": (Parts, ("q", "k", "conv")),
}


@pytest.fixture(params=PARENTS)
def parent(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _fast_path() -> Iterator[None]:
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def built(method: str, parent: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, targets = PARENTS[parent]
    return as_trained(method, build(), *targets, **options), torch.randn(2, 7, 12)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_adapter_acts_and_merging_changes_nothing(method: str, parent: str, grad: bool, training: bool) -> None:
    model, x = built(method, parent)
    model.train(training)
    with torch.set_grad_enabled(grad):
        found = model(x)
        with model.disable_adapter():
            base = model(x)
        assert relative_error(found.detach(), base.detach()) > 1e-3
        model.merge_adapter()
        assert error_of_update(found, model(x), base) < 1e-4
        model.unmerge_adapter()
        assert torch.equal(model(x), found)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        assert relative_error(model(x).detach(), found.detach()) > 1e-3


def test_its_gradients_are_right(method: str, parent: str) -> None:
    model, x = built(method, parent)
    model.double().train()
    parameters = trainable(model)

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x.double(),))

    assert_gradients_are_right(function, *(p.detach().clone().requires_grad_() for p in parameters.values()))


@pytest.mark.parametrize("grad", [True, False])
def test_the_fast_path_of_an_encoder_is_its_slow_one(method: str, grad: bool) -> None:
    model, x = built(method, "encoder")
    found = []
    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.set_grad_enabled(grad):
            found.append(model(x).detach())
    with model.disable_adapter():
        base = model(x)
    assert error_of_update(*found, base) < 1e-4


def test_steps_are_seen(method: str, parent: str) -> None:
    model, x = built(method, parent)
    model.train()
    optimizer, outputs = torch.optim.SGD(trainable(model).values(), lr=0.1), []
    for _ in range(3):
        y = model(x)
        outputs.append(y.detach())
        y.sin().sum().backward()
        assert all(p.grad is not None for p in trainable(model).values())
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(outputs[1], outputs[0]) > 1e-6
    assert relative_error(outputs[2], outputs[1]) > 1e-6


def test_in_half_precision_and_under_autocast(method: str, parent: str) -> None:
    if parent == "tied embedding":
        pytest.skip("its input would be rounded to other tokens")
    model, x = built(method, parent)
    expected = model(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(x).detach(), expected) < 5e-2
    assert relative_error(model.bfloat16()(x.bfloat16()).detach(), expected) < 5e-2


def test_a_weight_that_no_dropout_can_be_in_is_refused(method: str) -> None:
    if method not in DROPOUT:
        pytest.skip("has no dropout")
    model, x = built(method, "step", **DROPOUT[method])
    model(x)
    with pytest.raises(ValueError, match=r"dropout.*Set its dropout to 0"):
        model.train()(x)


def test_a_mixed_batch_is_refused(method: str) -> None:
    model, x = built(method, "step")
    with pytest.raises(ValueError, match="Call the model once for each adapter"), torch.no_grad():
        model(x, adapter_names=["default", "__base__"])
    model(x)


def test_what_is_asked_about_a_weight_computes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = built(method, "parts")
    for layer in layers_of(model):
        base = layer.get_base_layer().weight
        monkeypatch.setattr(layer, "fold", lambda *_, **__: pytest.fail("computed"))
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (base.shape, base.dtype, base.device)
        assert (weight.ndim, weight.numel(), weight.is_floating_point()) == (base.ndim, base.numel(), True)


def test_writing_to_a_computed_weight_is_refused(method: str) -> None:
    model, _ = built(method, "parts")
    for layer in layers_of(model):
        assert_writing_is_refused(layer, r"get_base_layer\(\)")


@torch.no_grad()
def test_a_bound_that_changes_nothing_may_be_set(method: str) -> None:
    """Gemma 3n bounds the weights of two of its projections in every step of a training."""
    model, _ = built(method, "parts")
    for layer in layers_of(model):
        values, base = layer.weight.clone(), layer.get_base_layer().weight.clone()
        largest = float(values.abs().max())
        for weight in (layer.weight, layer.weight.data):
            assert weight.clamp_(-2 * largest, 2 * largest) is weight
            weight.clamp_min_(-2 * largest)
            with pytest.raises(ValueError, match=rf"clamp_ .* would be lost.* of '{layer.key}'.*exclude_modules"):
                weight.clamp_(-largest / 2, largest / 2)
        assert torch.equal(layer.weight.clone(), values)
        assert torch.equal(layer.get_base_layer().weight, base)
