"""The tuner layer inside PEFT's machinery: hooks, scales, moves, shared work between adapters."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from helpers import (
    EVERY_METHOD,
    HOSTS_OF_12,
    UPDATES,
    OneLayer,
    Stack,
    adapt,
    adapted_stack,
    as_trained,
    counted,
    layers_of,
    one_by_one,
    only,
    psoft,
    randomize,
    reference_update,
    relative_error,
    seeded_host,
    trainable,
)
from isotune import get_peft_model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 24)


def test_the_update_of_every_layer_is_the_definition() -> None:
    for layer in layers_of(adapted_stack(torch.float64)):
        torch.testing.assert_close(layer.get_delta_weight("default"), reference_update(layer))


@pytest.mark.parametrize("hook", ["forward", "pre", "patched"])
def test_hooks_of_the_host_run(hook: str, x: torch.Tensor) -> None:
    """Offloading and quantisation act through hooks of the base layer, so its own forward must be called."""
    model = adapted_stack()
    expected, calls = model(x).detach(), []
    host = model.get_base_model().second.base_layer
    if hook == "forward":
        host.register_forward_hook(lambda *_: calls.append(1))
    elif hook == "pre":
        host.register_forward_pre_hook(lambda *_: calls.append(1))
    else:
        original = host.forward
        host.forward = lambda value: (calls.append(1), original(value))[1]
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]


def test_a_subclass_of_linear_keeps_its_own_forward(x: torch.Tensor) -> None:
    class Doubled(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(value)

    base = nn.Sequential(Doubled(24, 12))
    expected = base(x).detach()
    assert torch.equal(get_peft_model(base, psoft(target_modules=["0"], init_weights=True))(x), expected)


def test_inplace_activations_after_an_adapted_layer(x: torch.Tensor) -> None:
    base = nn.Sequential(nn.Linear(24, 32), nn.ReLU(inplace=True), nn.Linear(32, 8))
    model = adapt(base, target_modules=["0", "2"])
    model(x).sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_set_scale_and_what_it_scales(x: torch.Tensor) -> None:
    model = adapted_stack(torch.float64)
    layer = layers_of(model)[0]
    before = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), before / 2)
    layer.set_scale("default", 1.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), before)
    layer.set_scale("unknown", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), before)


def test_equal_weights_and_a_second_adapter_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters of one rank on one weight share the very tensors, and no subspace is found twice."""
    with counted(monkeypatch, "isotune.subspace.solvers.principal_subspace") as calls:
        model = adapted_stack()
        assert len(calls) == 3
        model.add_adapter("other", psoft(target_modules=["first", "second", "third"]))
        assert len(calls) == 3
    for layer in layers_of(model):
        assert layer.adapter("default").placement.down is layer.adapter("other").placement.down
        assert layer.adapter("default").placement.up is layer.adapter("other").placement.up


def test_loading_on_the_same_base_solves_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    adapted_stack().save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = Stack()
    torch.manual_seed(0)
    adapted = adapt(Stack(), target_modules=["first", "second", "third"])
    adapted.save_pretrained(tmp_path)
    with counted(monkeypatch, "isotune.subspace.solvers.principal_subspace") as calls:
        PeftModel.from_pretrained(base, tmp_path)
    assert len(calls) == 3


def test_a_moved_and_cast_model_while_merged(x: torch.Tensor) -> None:
    model = adapted_stack()
    weight = model.get_base_model().second.base_layer.weight.detach().clone()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    restored = model.get_base_model().second.base_layer.weight
    assert restored.dtype == torch.float64
    assert torch.equal(restored.float(), weight)
    assert model(x.double()).dtype == torch.float64


def test_a_state_dict_taken_while_merged_is_of_the_merged_weight_and_no_more(x: torch.Tensor) -> None:
    model = adapted_stack()
    names = set(model.state_dict())
    model.merge_adapter()
    assert set(model.state_dict()) == names


def test_merged_adapters_are_listed() -> None:
    model = adapted_stack()
    model.add_adapter("other", psoft(target_modules=["second"]))
    model.merge_adapter(adapter_names=["default", "other"])
    first, second, _ = layers_of(model)
    assert first.merged_adapters == ["default"]
    assert second.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    assert not first.merged
    assert not second.merged


def test_built_and_used_in_inference_mode(x: torch.Tensor) -> None:
    with torch.inference_mode():
        model = adapted_stack()
        y = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_frozen_and_trained_afterwards(x: torch.Tensor) -> None:
    model = adapted_stack()
    model.requires_grad_(False)
    y = model(x)
    assert not y.requires_grad
    model.set_adapter("default")
    model(x).sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())
    assert {name.split(".")[4] for name in trainable(model)} == {"default"}


def test_nothing_is_kept_alive_by_a_deleted_model(x: torch.Tensor) -> None:
    model = adapted_stack()
    model(x).sum().backward()
    reference = weakref.ref(layers_of(model)[0].get_base_layer())
    del model
    gc.collect()
    assert reference() is None


def test_a_deleted_adapter_is_freed(x: torch.Tensor) -> None:
    model = adapted_stack()
    model.add_adapter("other", psoft(r=5, target_modules=["first", "second"]))
    model.set_adapter("other")
    model(x).sum().backward()
    reference = weakref.ref(layers_of(model)[0].adapter("other").generator)
    model.zero_grad()
    model.set_adapter("default")
    model.delete_adapter("other")
    gc.collect()
    assert reference() is None


def test_no_warning_in_ordinary_use(x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted_stack()
        model.train()(x).sum().backward()
        model.eval()
        model.merge_adapter()
        model.unmerge_adapter()
        model.add_adapter("other", psoft(target_modules=["first"]))
        model.set_adapter("other")
        model.delete_adapter("default")
        model.merge_and_unload()


def test_adapters_of_one_name_in_two_models_do_not_meet(x: torch.Tensor) -> None:
    first = adapted_stack()
    second = copy.deepcopy(first)
    randomize(second, std=0.5)
    expected = [one_by_one(first)(x), one_by_one(second)(x)]
    for _ in range(2):
        for model, right in zip((first, second), expected, strict=True):
            torch.testing.assert_close(model(x), right, rtol=1e-5, atol=1e-6)
    assert relative_error(*expected) > 1e-3


def test_several_threads_at_once(x: torch.Tensor) -> None:
    """A server answers requests from a pool of threads."""
    from concurrent.futures import ThreadPoolExecutor

    model = adapted_stack()
    inputs = [torch.randn(5, 24) for _ in range(40)]
    with torch.no_grad():
        expected = [model(value) for value in inputs]

    def answer(value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(value)

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(answer, inputs), expected, strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("host", HOSTS_OF_12)
def test_two_threads_in_one_layer(host: str) -> None:
    """The second comes while the first is in the base layer, and would go on there when the first has left."""
    model, x = as_trained("oft", seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    with torch.no_grad():
        expected, results = model(x), []
    entered, joined, left = threading.Event(), threading.Event(), threading.Event()

    def meet(*_: Any) -> None:
        if threading.current_thread() is first:
            entered.set()
            joined.wait(0.1)  # in vain, where no two can be inside
        else:
            joined.set()
            left.wait(10)

    def call() -> None:
        with torch.no_grad():
            results.append(model(x))
        left.set()

    only(model).get_base_layer().register_forward_pre_hook(meet)
    first, second = threading.Thread(target=call), threading.Thread(target=call)
    first.start()
    entered.wait(10)
    second.start()
    first.join()
    second.join()
    assert len(results) == 2
    for found in results:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("host", HOSTS_OF_12)
def test_the_sizes_of_the_bases_layer_are_read_from_it(host: str) -> None:
    layer = only(as_trained("psoft", seeded_host(host), "layer"))
    module = layer.get_base_layer()
    for name in set(getattr(module, "__constants__", ())) - {"in_features", "out_features"}:
        assert getattr(layer, name) == getattr(module, name)


@pytest.mark.parametrize("method", ["psoft", "hra"])
def test_a_parent_that_reads_the_stride(method: str) -> None:
    """MobileNet pads the images by the sizes of its first convolution, before it calls that."""
    from transformers import MobileNetV1Config, MobileNetV1Model

    torch.manual_seed(0)
    base = MobileNetV1Model(MobileNetV1Config(image_size=32, depth_multiplier=0.25)).eval()
    model, images = as_trained(method, base, "conv_stem.convolution"), torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    assert relative_error(base(images).last_hidden_state, expected) == 0
    with model.disable_adapter():
        assert relative_error(model(images).last_hidden_state, expected) > 1e-3
    assert relative_error(model.merge_and_unload()(images).last_hidden_state, expected) < 1e-5


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_layer_that_returns_several_tensors(method: str) -> None:
    """As the routers of Phi-3.5-MoE and Llama 4 do, which are linear layers by their class."""

    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            scores = super().forward(x)
            return scores.softmax(-1), scores

    torch.manual_seed(0)
    base, x = OneLayer(Router(12, 20)), torch.randn(5, 12)
    model = as_trained(method, base, "layer")
    if method in (*UPDATES, "boft") or method.endswith("-output"):
        with pytest.raises(ValueError, match=r"'layer' returns a tuple, and no tensor.*exclude_modules"):
            model(x)
    else:
        found = model(x)[1]
        assert relative_error(model.merge_and_unload()(x)[1], found) < 1e-5
