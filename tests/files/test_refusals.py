"""What an adapter file may hold: the same refusals by every way in which one is loaded, before anything has changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import tiny_bert, tiny_opt
from isotune import HRAConfig, LoraXsConfig, OFTConfig, PeftModel, PsoftConfig, get_peft_model, hotswap_adapter
from isotune.diagnostics.inspect import inspect
from isotune.errors import AdapterFileError
from isotune.files.adapter import describe
from isotune.files.export_lora import export_lora
from isotune.tuner.state import ORTHONORMAL, check_values

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
METHODS: dict[str, Callable[..., Any]] = {
    "psoft": lambda **options: PsoftConfig(**{"r": 4, "target_modules": r"\d+", **options}),
    "lora_xs": lambda **options: LoraXsConfig(**{"r": 4, "target_modules": r"\d+", **options}),
    "oft": lambda **options: OFTConfig(**{"oft_block_size": 4, "target_modules": r"\d+", **options}),
    "hra": lambda **options: HRAConfig(**{"r": 4, "target_modules": r"\d+", **options}),
}
FIRST = {"psoft": "generator", "lora_xs": "coefficients", "oft": "generator", "hra": "vectors"}


def stack(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth)))


def saved(folder: Path, config: Any, model: nn.Module | None = None) -> Path:
    torch.manual_seed(1)
    get_peft_model(model or stack(), config).save_pretrained(str(folder))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any] | None = None, **options: Any) -> None:
    if change is not None:
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **options}))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def from_pretrained(folder: Path, config: Any) -> None:
    base = stack()
    before = state_of(base)
    try:
        PeftModel.from_pretrained(base, folder)
    finally:
        torch.testing.assert_close(state_of(base), before, rtol=0, atol=0)


def load_adapter(folder: Path, config: Any) -> None:
    model = get_peft_model(stack(), config)
    before = state_of(model)
    try:
        model.load_adapter(str(folder), "second")
    finally:
        torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


def hotswap(folder: Path, config: Any) -> None:
    model = get_peft_model(stack(), config)
    before = state_of(model)
    try:
        hotswap_adapter(model, folder)
    finally:
        torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


LOADERS = [from_pretrained, load_adapter, hotswap]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("method", METHODS)
def test_an_honest_file_is_taken(method: str, load: Any, tmp_path: Path) -> None:
    config = METHODS[method]
    folder = saved(tmp_path, config())
    with pytest.raises(AssertionError):  # the adapter has come, so the model is another
        load(folder, config(init_weights=False))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_tensors_without_a_place(method: str, load: Any, tmp_path: Path) -> None:
    config = METHODS[method]
    for number, (name, tensor, message) in enumerate(
        [
            ("0.base_layer.weight", torch.randn(16, 16), "overwrite"),
            ("1.base_layer.bias", torch.randn(16), "overwrite"),
            ("9.isotune_operator.x", torch.randn(4), "no place"),
            ("0.isotune_operator.x", torch.randn(4), "no place"),
            ("0.isotune_form.other", torch.randn(4), "no place"),
            ("head.weight", torch.randn(4), "no place"),
        ]
    ):
        folder = saved(tmp_path / str(number), config())
        edit(folder, lambda tensors, name=name, tensor=tensor: tensors.update({PREFIX + name: tensor}))
        with pytest.raises(ValueError, match=re.escape(name.split(".")[0] if load is hotswap else name)) as refused:
            load(folder, config())
        assert "\n" not in str(refused.value)
        if load is not hotswap:
            assert message in str(refused.value)
            assert str(folder) in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_more_layers_than_the_base_has(method: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, METHODS[method](), stack(4))
    base = stack(2)
    with pytest.raises(AdapterFileError, match=r"'[23]\.isotune_.*no place"):
        PeftModel.from_pretrained(base, folder)
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize("option", ["psoft_mag_a", "psoft_mag_b"])
def test_a_vector_that_the_options_do_not_have(option: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, METHODS["psoft"]())
    edit(folder, **{option: False})
    with pytest.raises(AdapterFileError, match=r"scale.*no place"):
        PeftModel.from_pretrained(stack(), folder)
    file = describe(folder)
    with pytest.raises(AdapterFileError, match="scale"):
        file.operator("0")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_another_kind(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    key = f"{PREFIX}0.isotune_operator.{FIRST[method]}"
    folder = saved(tmp_path, METHODS[method]())
    try:
        edit(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    except KeyError:
        pytest.skip(f"this safetensors cannot store {dtype}")
    kind = str(dtype).removeprefix("torch.")
    for load in LOADERS:
        with pytest.raises(AdapterFileError, match=rf"{FIRST[method]}' is stored as {kind} in .*{tmp_path.name}"):
            load(folder, METHODS[method]())
    with pytest.raises(AdapterFileError, match=kind):
        describe(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("basis", ["pinned", "embedded"])
def test_rounded_files_are_taken(basis: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path, METHODS["psoft"](basis=basis))
    edit(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    PeftModel.from_pretrained(stack(), folder)
    describe(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda basis: basis * 7,
        lambda basis: basis * 1.01,
        lambda basis: torch.cat([basis[:1], basis[:1], basis[2:]]),
        lambda basis: torch.cat([basis[:3], torch.zeros(1, basis.shape[1])]),
        torch.ones_like,
    ],
)
@pytest.mark.parametrize("method", ["psoft", "lora_xs"])
def test_an_embedded_basis_is_orthonormal(method: str, change: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, METHODS[method](basis="embedded"))
    key = f"{PREFIX}1.isotune_form.basis"
    edit(folder, lambda tensors: tensors.update({key: change(tensors[key])}))
    for load in LOADERS:
        with pytest.raises(AdapterFileError, match=r"1\.isotune_form\.basis' in .* not orthonormal"):
            load(folder, METHODS[method](basis="embedded"))
    with pytest.raises(AdapterFileError, match="orthonormal"):
        describe(folder)


def test_rounding_a_basis_stays_well_within_what_is_allowed() -> None:
    for shape in ((1, 1), (4, 16), (64, 768), (16, 16)):
        basis = torch.linalg.qr(torch.randn(shape[1], shape[0])).Q.T
        for dtype in (torch.bfloat16, torch.float16):
            check_values("x.basis", basis.to(dtype))
            wide = basis.to(dtype).double()
            assert float((wide @ wide.T - torch.eye(shape[0])).abs().max()) < 0.4 * ORTHONORMAL
    with pytest.raises(AdapterFileError, match="inf"):
        check_values("x.basis", torch.ones(10**6, 1))  # no 10⁶ × 10⁶ matrix is made of it


# -- what is legitimately saved besides --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", ["all", "isotune_only"])
def test_trained_biases_and_saved_modules(method: str, bias: str, tmp_path: Path) -> None:
    def bert() -> nn.Module:
        torch.manual_seed(0)
        return tiny_bert()

    options = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "bias": bias}
    model = get_peft_model(bert(), METHODS[method](**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(str(tmp_path))
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(bert(), tmp_path, adapter_name=name)
        for found, expected in zip(loaded.parameters(), model.parameters(), strict=True):
            assert torch.equal(found, expected)
    for part in ("modules_to_save.default.", "modules_to_save."):  # as PEFT's own rule and the first release have it
        key = f"{PREFIX}classifier.{part}bias"
        edit(tmp_path, lambda tensors, key=key: tensors.update({key: torch.zeros(2)}))
        if bias == "all":  # else nothing writes it
            PeftModel.from_pretrained(bert(), tmp_path, adapter_name="third")
    edit(tmp_path, bias="none")
    with pytest.raises(AdapterFileError, match=r"bias' in .* (overwrite|no place)"):
        PeftModel.from_pretrained(bert(), tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_embeddings_that_peft_saves(targets: list[str], tmp_path: Path) -> None:
    model = get_peft_model(tiny_opt(), METHODS["psoft"](target_modules=targets))
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert any("embed_tokens" in name and name.endswith("weight") for name in load_file(tmp_path / FILE))
    PeftModel.from_pretrained(tiny_opt(), tmp_path)


# -- without a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("psoft", {"r": 10**5}),
        ("psoft", {"r": 10**5, "psoft_orth": False}),
        ("psoft", {"r": 10**30}),
        ("lora_xs", {"r": 10**5}),
        ("hra", {"r": 10**8}),
        ("oft", {"oft_block_size": 16}),
    ],
)
def test_a_size_that_only_the_configuration_has_is_never_allocated(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved(tmp_path, METHODS[method]())
    edit(folder, **options)
    with pytest.raises(AdapterFileError, match="the tensors of '0' do not fit") as refused:
        describe(folder).operator("0")
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(AdapterFileError, match="do not fit adapter_config"):
        inspect(folder)
    with pytest.raises(ValueError, match=r"too large|shape|do not fit"):
        export_lora(folder, tmp_path / "lora", base=stack(), rank=2)


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, '{"r":' * 100_000])
def test_a_deep_configuration_is_one_line(content: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, METHODS["psoft"]())
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is damaged: ") as refused:
        describe(folder)
    assert "\n" not in str(refused.value)
