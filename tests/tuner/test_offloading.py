"""Weights that accelerate or diffusers keep elsewhere, or in another dtype, between the calls of their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import (
    EMBEDDED,
    EVERY_METHOD,
    FEW,
    HOSTS_OF_12,
    LORA,
    Chain,
    as_trained,
    error_of_update,
    only,
    relative_error,
    seeded_host,
    some_tokens,
    tiny_llama,
    trainable,
)
from isotune.internals.peft_hooks import HAS_HOOKS

pytestmark = [
    pytest.mark.parametrize("method", [*EVERY_METHOD, LORA]),
    pytest.mark.covered(method=FEW, host=("linear", "conv2d", "embedding")),
]

CPU = torch.device("cpu")


def to_cpu(model: nn.Module, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, CPU)


def to_cpu_with_buffers(model: nn.Module, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, CPU, offload_buffers=True)


def to_disk(model: nn.Module, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, str(folder), execution_device=CPU)


def to_disk_with_buffers(model: nn.Module, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, str(folder), execution_device=CPU, offload_buffers=True)


def grouped(level: str, disk: bool) -> Callable[[nn.Module, Path], None]:
    def offload(model: nn.Module, folder: Path) -> None:
        hooks = pytest.importorskip("diffusers.hooks")
        where: dict[str, Any] = {"onload_device": CPU, "offload_device": CPU, "offload_type": level}
        if level == "block_level":
            where["num_blocks_per_group"] = 1
        if disk:
            where["offload_to_disk_path"] = str(folder)
        hooks.apply_group_offloading(model, **where)

    return offload


ACCELERATE = [to_cpu, to_cpu_with_buffers, to_disk, to_disk_with_buffers]
GROUPED = {
    f"{level} to {'disk' if disk else 'memory'}": grouped(level, disk)
    for level in ("leaf_level", "block_level")
    for disk in (False, True)
}


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("offload", ACCELERATE)
@pytest.mark.parametrize("used", [True, False])
@torch.no_grad()
def test_offloaded_after_the_adapter(method: str, host: str, offload: Any, used: bool, tmp_path: Path) -> None:
    if method == LORA and host in ("transposed", "conv3d", "embedding"):
        pytest.skip("needs other options")
    model, x = as_trained(method, seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    expected = copy.deepcopy(model)(x)
    if used:
        model(x)
    offload(model.get_base_model(), tmp_path)
    for _ in range(2):
        assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize("offload", ACCELERATE)
@pytest.mark.parametrize("basis", ["pinned", "embedded"])
@torch.no_grad()
def test_offloaded_before_the_adapter(method: str, offload: Any, basis: str, tmp_path: Path) -> None:
    if method == LORA:
        pytest.skip("is wrong by itself here")
    options = {"basis": basis} if method in ("psoft", "lora_xs", "oplora") else {}
    model, x = as_trained(method, **options), torch.randn(5, 12)
    model.save_pretrained(tmp_path / "adapter")
    base = Chain()
    offload(base, tmp_path / "weights")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for _ in range(2):
        assert error_of_update(loaded(x), model(x), Chain()(x)) < 1e-4


@pytest.mark.covered(method=FEW)
@pytest.mark.skipif(not HAS_HOOKS, reason="PEFT 0.18 raises a KeyError, with LoRA too")
def test_loaded_onto_a_model_that_is_partly_on_disk(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes accelerate's hooks off until the file's tensors are there."""
    monkeypatch.chdir(tmp_path)  # PEFT takes the folder's path for one below the current folder
    trained = as_trained(method, tiny_llama(hidden_size=48), "q_proj")
    adapter, tokens = tmp_path / "adapter", some_tokens()
    expected = trained(tokens).logits.detach()
    trained.save_pretrained(adapter)
    plain = trained.unload()
    plain.save_pretrained(tmp_path / "base")
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head", "model.rotary_emb")
    devices = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}

    def load(**options: Any) -> Any:
        return type(plain).from_pretrained(tmp_path / "base", offload_folder=tmp_path / "off", **options).eval()

    inside = {f"base_model.model.{name}": device for name, device in devices.items()}
    model = PeftModel.from_pretrained(
        load(device_map=devices), adapter, device_map=inside, offload_folder=str(tmp_path / "more")
    ).eval()
    assert relative_error(model(tokens).logits, expected) < 1e-5
    model.merge_adapter()
    assert relative_error(model(tokens).logits, expected) < 1e-4
    if method == LORA:
        return
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj' is on disk.*PeftModel.from_pretrained"):
        load(device_map=devices).load_adapter(str(adapter))
    whole = load(device_map={**devices, "model.layers.1": "cpu"})
    whole.load_adapter(str(adapter))
    assert relative_error(whole(tokens).logits, expected) < 1e-5


@pytest.mark.parametrize("offload", ACCELERATE)
def test_unmerged_once_offloaded(method: str, offload: Any, tmp_path: Path) -> None:
    """The weights that were merged are gone then, and no layer may be given another's."""
    model, x = as_trained(method, Chain(*range(12, 156, 12))), torch.randn(5, 12)
    with model.disable_adapter():
        original = model(x).detach()
    expected = model(x).detach()
    model.merge_adapter()
    offload(model, tmp_path)
    model.unmerge_adapter()
    assert relative_error(model(x), expected) < 1e-5
    with model.disable_adapter():
        assert relative_error(model(x), original) < 1e-6


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_switching_and_disabling_while_offloaded(method: str, offload: Any, tmp_path: Path) -> None:
    model, x = as_trained(method), torch.randn(5, 12)
    model.add_adapter("other", model.peft_config["default"])
    plain = copy.deepcopy(model)
    offload(model.get_base_model(), tmp_path)
    with torch.no_grad():
        for name in ("other", "default"):
            for each in (model, plain):
                each.set_adapter(name)
            assert relative_error(model(x), plain(x)) < 1e-5
            with model.disable_adapter():
                assert relative_error(model(x), Chain()(x)) < 1e-6


@pytest.mark.parametrize("way", GROUPED)
@torch.no_grad()
def test_group_offloading(method: str, way: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model, x = as_trained(method), torch.randn(5, 12)
    expected = copy.deepcopy(model)(x)
    GROUPED[way](model.get_base_model(), tmp_path)
    for _ in range(2):
        assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_layerwise_casting(method: str, first: bool) -> None:
    """The frozen weights are stored in bfloat16 and computed with in float32."""
    if first and method in EMBEDDED:
        pytest.skip("starts on the singular vectors of the rounded weights, whose signs are free")
    hooks = pytest.importorskip("diffusers.hooks")
    expected, x, base = as_trained(method), torch.randn(5, 12), Chain()
    dtypes = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    if first:
        hooks.apply_layerwise_casting(base, **dtypes)
    model = as_trained(method, base)
    if not first:
        hooks.apply_layerwise_casting(model.get_base_model(), **dtypes)
    with torch.no_grad():
        for _ in range(2):
            assert error_of_update(model(x), expected(x), Chain()(x)) < 0.1


def test_merging_what_is_offloaded_is_right_or_refused(method: str, tmp_path: Path) -> None:
    if method == LORA:
        pytest.skip("is wrong by itself here")
    model, x = as_trained(method, seeded_host("linear"), "layer"), torch.randn(5, 12)
    expected = model(x).detach()
    to_cpu(model.get_base_model(), tmp_path)
    try:
        model.merge_adapter()
    except (ValueError, NotImplementedError, RuntimeError):
        assert not only(model).merged
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-5


def test_training_what_accelerate_dispatches(method: str) -> None:
    """A model on one device that went through dispatch_model, as `device_map="auto"` gives it."""
    from accelerate import dispatch_model

    base, x = Chain(), torch.randn(5, 12)
    model = as_trained(method, dispatch_model(base, {"": "cpu"}, force_hooks=True)).train()
    twin = as_trained(method).train()
    for each in (model, twin):
        each(x).sin().sum().backward()
    for one, other in zip(trainable(model).values(), trainable(twin).values(), strict=True):
        assert relative_error(one.grad, other.grad) < 1e-5
