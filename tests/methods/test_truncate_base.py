"""CERSA's truncate_base: the paper's layer, what it saves and changes, its file, and all that it must refuse."""

from __future__ import annotations

import copy
import gc
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import isotune
from helpers import (
    Chain,
    assert_unchanged,
    assert_writing_is_refused,
    layers_of,
    move,
    only,
    relative_error,
    snapshot,
    some_tokens,
    tiny_gpt2,
    tiny_llama,
    trainable,
    transformers_takes_peft,
)
from isotune import CersaConfig, PsoftConfig, get_peft_model, truncation_error
from isotune.errors import AdapterFileError, BaseMismatchError, IsotuneWarning
from isotune.files.export_lora import export_lora
from isotune.files.export_merged import export_merged
from isotune.hosts import FactoredLinear
from isotune.subspace.energy import kept_shares
from isotune.subspace.solvers import principal_subspace
from isotune.tools.hotswap import hotswap_adapter
from isotune.tools.merging import merge_adapters
from quantisers import quantise

pytestmark = pytest.mark.filterwarnings("ignore:truncate_base has changed:isotune.errors.IsotuneWarning")

FILES = [str(Path(isotune.__file__).parent / name) for name in ("tuner/truncating.py", "tuner/placing.py")]
LLAMA = ["q_proj", "o_proj", "up_proj"]


@torch.no_grad()
def decaying(model: Any, factor: float = 0.8) -> Any:
    """The same model with weights of geometrically falling singular values."""
    for name, module in model.named_modules():
        if hasattr(module, "weight") and module.weight.ndim == 2 and not isinstance(module, nn.Embedding):
            left, values, right = torch.linalg.svd(module.weight.double(), full_matrices=False)
            if "head" not in name:
                values = values[0] * factor ** torch.arange(len(values)).double()
            module.weight.copy_((left * values) @ right)
    return model


def chain() -> Any:
    return decaying(Chain(24, 32, 16, 24))


def cersa(**options: Any) -> CersaConfig:
    base = {} if "base_rank_pattern" in options else {"truncate_base": True, "base_energy": 0.95}
    return CersaConfig(**{"target_modules": r"layers\.\d", **base, **options})


def adapted(base: Any = None, seed: int = 1, **options: Any) -> Any:
    return move(get_peft_model(chain() if base is None else base, cersa(**options)), seed).eval()


def llama() -> Any:
    return decaying(tiny_llama()).eval()


def cut(weight: Tensor, rank: int) -> Tensor:
    """W_k."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).to(weight.dtype)


@torch.no_grad()
def truncated_chain(config: CersaConfig) -> Any:
    """A plain chain of dense weights W_k."""
    base = chain()
    for index, layer in enumerate(base.layers):
        layer.weight.copy_(cut(layer.weight, config.base_rank(f"layers.{index}") or min(layer.weight.shape)))
    return base


def numbers_of(layer: Any) -> int:
    return sum(factor.numel() for factor in (layer.left, layer.values, layer.right))


class Paper(nn.Module):
    """y = U_k K V_kᵀ x, of which the leading r × r block of K is trained from its start at the singular values."""

    def __init__(self, weight: Tensor, rank: int, kept: int) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self.left, self.right, self.values = left[:, :kept], right[:kept], values[:kept]
        self.core = nn.Parameter(torch.diag(values[:rank]))

    def forward(self, x: Tensor) -> Tensor:
        core = torch.block_diag(self.core, torch.diag(self.values[len(self.core) :]))
        return x @ self.right.T @ core.T @ self.left.T


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("rank", [2, 4])
def test_training_is_the_paper_s(shape: tuple[int, int], optimizer: str, rank: int) -> None:
    layer = nn.Linear(*shape, bias=False, dtype=torch.float64)
    twin = Paper(layer.weight.detach().clone(), rank, 4)
    config = CersaConfig(r=rank, base_rank_pattern={"0": 4}, target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    x, target = torch.randn(30, shape[0], dtype=torch.float64), torch.randn(30, shape[1], dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    outputs = []
    for trained in (model, twin):
        stepping = getattr(torch.optim, optimizer)(trainable(trained).values(), lr=1e-2)
        for _ in range(20):
            (trained(x) - target).square().mean().backward()
            stepping.step()
            stepping.zero_grad()
        outputs.append(trained(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert float((twin.core.detach() - torch.diag(twin.values[:rank])).abs().max()) > 1e-3
    merged = model.merge_and_unload()
    assert isinstance(merged[0], FactoredLinear)
    assert merged[0].rank == 4
    torch.testing.assert_close(merged(x), outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("measure", ["squares", "values"])
def test_ranks_are_the_least_that_hold_the_energies(measure: str) -> None:
    base = chain()
    config = cersa(rank_measure=measure, base_energy=0.9, rank_energy=0.6)
    chosen = get_peft_model(copy.deepcopy(base), config).peft_config["default"]
    for index, layer in enumerate(base.layers):
        values = torch.linalg.svdvals(layer.weight.detach().double())
        kept = kept_shares(values.square() if measure == "squares" else values)
        k, r = chosen.base_rank(f"layers.{index}"), chosen.rank_of(f"layers.{index}")
        assert kept[r - 1] >= 0.6 > kept[r - 2]
        if k is not None:
            assert kept[k - 1] >= 0.9 > kept[k - 2]
            assert r < k
    cut_layers = [chosen.base_rank(f"layers.{index}") is not None for index in range(3)]
    assert cut_layers == ([True] * 3 if measure == "squares" else [True, True, False])
    assert (config.base_rank_pattern, config.base_energy) == ({}, 0.9)  # the given one can choose again


def test_the_rank_below_near_equal_singular_values_is_not_taken() -> None:
    layer = nn.Linear(64, 64, bias=False)
    values = torch.tensor([8.0, 4.0, 2.0, 2.0, 2.0, 0.2, 0.1, 0.1]).double()
    left, right = (torch.linalg.qr(torch.randn(64, 8).double()).Q for _ in range(2))
    with torch.no_grad():
        layer.weight.copy_((left * values) @ right.T)
    kept = kept_shares(values.square())
    config = CersaConfig(truncate_base=True, base_energy=kept[2] - 1e-3, target_modules=["0"])
    chosen = get_peft_model(nn.Sequential(layer), config).peft_config["default"]
    assert (chosen.r, chosen.base_rank("0")) == (3, 5)


def test_a_layer_that_would_not_shrink_stays_whole() -> None:
    base = Chain(24, 24, 24)
    base.layers[1] = decaying(base.layers[1])
    weight = base.layers[0].weight
    model = get_peft_model(base, cersa())
    first, second = layers_of(model)
    assert first.base_layer.weight is weight
    assert isinstance(second.base_layer, FactoredLinear)
    assert list(model.peft_config["default"].base_rank_pattern) == [r"^layers\.1"]


def test_nothing_is_done_where_nothing_would_shrink() -> None:
    base = Chain(24, 24)
    before = snapshot(base)
    with pytest.raises(ValueError, match="truncate_base=True would save nothing"):
        get_peft_model(base, cersa())
    assert_unchanged(base, before)


def test_it_says_what_it_did() -> None:
    with pytest.warns(IsotuneWarning, match="truncate_base has changed the base model") as found:
        model = get_peft_model(chain(), cersa())
    (text,) = {str(one.message) for one in found}
    layers = [layer.base_layer for layer in layers_of(model)]
    numbers = sum(numbers_of(layer) for layer in layers)
    assert "3 of 3 layers truncated to rank" in text
    assert f"{numbers:,} numbers instead of {24 * 32 + 32 * 16 + 16 * 24:,}" in text
    for layer, plain in zip(layers, chain().layers, strict=True):
        weight = plain.weight.detach()
        share = cut(weight, layer.rank).square().sum() / weight.square().sum()
        assert layer.energy == pytest.approx(float(share), abs=1e-5)


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    base = chain()
    before = snapshot(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IsotuneWarning)
        with pytest.raises(IsotuneWarning):
            get_peft_model(base, cersa())
    assert_unchanged(base, before)


def test_the_dense_weights_are_freed() -> None:
    base = chain()
    weights = [weakref.ref(layer.weight) for layer in base.layers]
    model = get_peft_model(base, cersa())
    model(torch.randn(2, 24)).sum().backward()
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_everything_stands_on_the_truncated_base() -> None:
    model = adapted()
    plain, x = truncated_chain(model.peft_config["default"]), torch.randn(5, 24)
    assert relative_error(chain()(x), plain(x)) > 0.02
    with model.disable_adapter():
        assert relative_error(model(x), plain(x)) < 1e-5
    output, kept = model(x), [layer.base_layer.left for layer in layers_of(model)]
    assert relative_error(output, plain(x)) > 0.05
    for layer in layers_of(model):
        with torch.no_grad():
            other = layer.base_layer.weight + layer.get_delta_weight("default")
        assert relative_error(layer.weight + 0.0, other) < 1e-5
        assert_writing_is_refused(layer.base_layer, "load_state_dict")
    model.merge_adapter()
    assert relative_error(model(x), output) < 1e-5
    assert all(layer.base_layer.left is not own for layer, own in zip(layers_of(model), kept, strict=True))
    model.unmerge_adapter()
    assert all(layer.base_layer.left is own for layer, own in zip(layers_of(model), kept, strict=True))
    bare = model.unload()
    assert not layers_of(bare)
    assert relative_error(bare(x), plain(x)) < 1e-5


def test_the_merged_model_is_smaller_and_saves_plain_weights(tmp_path: Path) -> None:
    model = adapted()
    x = torch.randn(5, 24)
    output = model(x)
    merged = model.merge_and_unload()
    assert relative_error(merged(x), output) < 1e-5
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in chain().parameters())
    plain = chain()
    plain.load_state_dict(merged.state_dict())
    assert relative_error(plain(x), output) < 1e-5
    again = adapted(seed=2).merge_and_unload()
    again.load_state_dict(merged.state_dict())
    assert relative_error(again(x), output) < 1e-5
    with pytest.raises(RuntimeError, match="has directions that this layer of rank"):
        again.load_state_dict(chain().state_dict())


def test_its_file_has_the_ranks_alone_and_loads_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(rank_energy=0.6)
    x = torch.randn(5, 24)
    output = model(x)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["base_rank_pattern"] == model.peft_config["default"].base_rank_pattern
    assert stored["isotune_format"] == 4
    assert not stored.keys() & {"truncate_base", "base_energy", "rank_energy"}
    with monkeypatch.context() as patch:
        patch.setattr("isotune.tuner.sizes.size_layers", None)  # nothing is chosen anew
        loaded = PeftModel.from_pretrained(chain(), tmp_path)
    assert loaded.peft_config["default"].truncate_base
    assert relative_error(loaded(x), output) < 1e-5
    assert [layer.base_layer.rank for layer in layers_of(loaded)] == [x.base_layer.rank for x in layers_of(model)]
    plain = CersaConfig(target_modules=["0"], r=2).to_dict()
    assert plain["isotune_format"] == 1
    assert "base_rank_pattern" not in plain
    monkeypatch.setattr("isotune.methods.config.FORMAT_VERSION", 3)  # an earlier release
    with pytest.raises(AdapterFileError, match="format version 4"):
        PeftModel.from_pretrained(chain(), tmp_path)


@pytest.mark.parametrize("damage", ["another base", "a missing tensor", "NaN"])
def test_a_file_that_is_refused_leaves_the_base_whole(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapted().save_pretrained(tmp_path)
    base, file = chain(), tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if damage == "another base":
        base = decaying(Chain(24, 32, 16, 24, seed=3))
    elif damage == "NaN":
        next(iter(tensors.values()))[:] = float("nan")
    else:
        del tensors[next(iter(tensors))]
    save_file(tensors, file, metadata={"format": "pt"})
    before = snapshot(base)
    with pytest.raises(BaseMismatchError if damage == "another base" else AdapterFileError):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_a_file_of_more_directions_than_a_weight_has(tmp_path: Path) -> None:
    adapted(target_modules=["layers.0"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_rank_pattern": {"layers.0": 25}}))
    base = chain()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"k=25 is too large for the module 'layers\.0'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 24)
    expected = model(x)
    loaded = PeftModel.from_pretrained(chain().to(dtype), tmp_path)
    assert relative_error(loaded(x.to(dtype)).float(), expected) < 5e-2
    assert {layer.base_layer.left.dtype for layer in layers_of(loaded)} == {dtype}
    output = loaded(x.to(dtype)).float()
    merged = loaded.merge_and_unload()
    assert relative_error(merged(x.to(dtype)).float(), output) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x).float(), expected) < 5e-2


def test_gradients_reach_the_input_and_the_bias() -> None:
    base, x = chain(), torch.randn(3, 24, requires_grad=True)
    model = get_peft_model(base, cersa(bias="all"))
    model(x).square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {"core", "bias"}


@pytest.mark.parametrize("build", [llama, lambda: decaying(tiny_gpt2()).eval()], ids=["llama", "gpt2"])
def test_a_model_of_transformers(build: Callable[[], Any], tmp_path: Path) -> None:
    """Trained, saved, loaded, merged, and written as a plain model that transformers loads by itself."""
    targets = LLAMA if "Llama" in type(build()).__name__ else ["c_attn", "c_fc"]
    model = adapted(build(), target_modules=targets)
    assert any(isinstance(layer.base_layer, FactoredLinear) for layer in layers_of(model))
    tokens = some_tokens()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert relative_error(loaded(tokens).logits, expected) < 1e-4
    export_merged(loaded, tmp_path / "exported")
    assert relative_error(loaded(tokens).logits, expected) < 1e-4
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    for folder in ("exported", "saved"):
        plain = type(build()).from_pretrained(tmp_path / folder)
        assert not any(isinstance(module, FactoredLinear) for module in plain.modules())
        assert relative_error(plain(tokens).logits, expected) < 1e-4
    with pytest.raises(ValueError, match="which no LoRA on the base model does"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", base=build())


@transformers_takes_peft
def test_transformers_own_methods(tmp_path: Path) -> None:
    model, tokens = llama(), some_tokens()
    model.add_adapter(cersa(target_modules=LLAMA))
    move(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path))
    assert relative_error(other(tokens).logits, expected) < 1e-4
    assert any(isinstance(layer.base_layer, FactoredLinear) for layer in layers_of(other))


def test_several_adapters_of_one_truncation(tmp_path: Path) -> None:
    models = [adapted(seed=seed) for seed in (1, 2)]
    x = torch.randn(5, 24)
    outputs = [model(x) for model in models]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    both = PeftModel.from_pretrained(chain(), tmp_path / "0")
    both.load_adapter(str(tmp_path / "1"), "other")
    for name, output in zip(("default", "other"), outputs, strict=True):
        both.set_adapter(name)
        assert relative_error(both(x), output) < 1e-5
    both.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    both.set_adapter("mean")
    mean = both(x)
    merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    assert relative_error(PeftModel.from_pretrained(chain(), tmp_path / "mean")(x), mean) < 1e-5
    hotswap_adapter(models[0], tmp_path / "1")
    assert relative_error(models[0](x), outputs[1]) < 1e-5
    both.delete_adapter("mean")
    both.delete_adapter("other")
    assert relative_error(both.merge_and_unload()(x), outputs[0]) < 1e-5


def test_a_swapped_adapter_does_not_write_to_the_base(tmp_path: Path) -> None:
    """Its basis is that of a base of other rounding, and the factors of the adapter before it are the layer's."""
    model = adapted()
    found = model.peft_config["default"]
    other = chain()
    with torch.no_grad():
        for layer in other.layers:
            layer.weight *= 1 + 1e-4 * torch.randn(layer.weight.shape)
    options = {"r": found.r, "rank_pattern": found.rank_pattern, "base_rank_pattern": found.base_rank_pattern}
    adapted(other, seed=2, **options).save_pretrained(tmp_path)
    before = [snapshot(layer.base_layer) for layer in layers_of(model)]
    hotswap_adapter(model, tmp_path)
    for layer, values in zip(layers_of(model), before, strict=True):
        assert_unchanged(layer.base_layer, values)
    x = torch.randn(5, 24)
    assert relative_error(model(x), PeftModel.from_pretrained(chain(), tmp_path)(x)) < 1e-6


def test_other_adapters_are_refused_on_a_truncated_base(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "first")
    pattern = dict(model.peft_config["default"].base_rank_pattern)
    lower = {name: rank - 1 for name, rank in pattern.items()}
    other = adapted(base_rank_pattern=lower, r=2)
    other.save_pretrained(tmp_path / "lower")
    before = snapshot(model)
    wrong: list[Any] = [
        PsoftConfig(r=2, target_modules=r"layers\.\d"),
        CersaConfig(r=2, target_modules=["layers.0"]),
        cersa(base_rank_pattern=lower, r=2),
        cersa(base_rank_pattern=pattern, r=2, target_modules=["layers.0"]),
        cersa(base_energy=0.5),
    ]
    for config in wrong:
        with pytest.raises(ValueError, match="The weights of this model are truncated"):
            isotune.add_adapter(model, "other", config)
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match="is for a base that is truncated otherwise"):
        hotswap_adapter(model, tmp_path / "lower")
    with pytest.raises(ValueError, match="truncate the base differently"):
        merge_adapters([tmp_path / "first", tmp_path / "lower"], tmp_path / "mean")
    assert_unchanged(model, before)
    model.add_adapter("same", cersa(base_rank_pattern=pattern, r=2))
    bare = other.unload()
    with pytest.raises(ValueError, match="The weights of this model are truncated"):
        get_peft_model(bare, PsoftConfig(r=2, target_modules=r"layers\.\d"))
    with pytest.raises(ValueError, match="The weights of this model are truncated"):
        PeftModel.from_pretrained(bare, tmp_path / "first")
    x = torch.randn(5, 24)
    on_bare = PeftModel.from_pretrained(bare, tmp_path / "lower")
    assert relative_error(on_bare(x), PeftModel.from_pretrained(chain(), tmp_path / "lower")(x)) < 1e-5


def test_a_model_with_other_adapters_is_refused() -> None:
    model = get_peft_model(chain(), PsoftConfig(r=2, target_modules=["layers.0"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="would change the weights below 'default'"):
        isotune.add_adapter(model, "second", cersa(target_modules=["layers.1"]))
    assert_unchanged(model, before)
    base = wrapped_in_lora()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"would change the weights below 'peft\.tuners\.lora"):
        get_peft_model(base, cersa(target_modules=["layers.0"]))
    assert_unchanged(base, before)


class Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(24, 16), nn.Linear(16, 24, bias=False)])
        self.layers[1].weight = self.layers[0].weight


def hooked() -> Any:
    base = chain()
    base.layers[1].register_forward_hook(lambda *_: None)
    return base


def wrapped_in_lora() -> Any:
    lora = LoraConfig(r=2, target_modules=["layers.1"])
    return get_peft_model(chain(), lora, adapter_name="inner").get_base_model()


def with_one(index: int, module: nn.Module) -> Callable[[], Any]:
    def build() -> Any:
        base = chain()
        base.layers[index] = module
        return base

    return build


UNSUITABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "convolution": (with_one(1, nn.Conv2d(4, 8, 3)), "a Conv2d: it must be an nn.Linear or Conv1D"),
    "embedding": (with_one(1, nn.Embedding(16, 32)), "a Embedding: it must be"),
    "forward of its own": (with_one(1, Other(32, 16)), "a Other: it must be"),
    "tied": (Tied, "another module has the same weight"),
    "hook": (hooked, "its module has hooks"),
    "lora": (wrapped_in_lora, "another tuner's adapter is on it"),
    "meta": (lambda: chain().to("meta"), "it has no values yet"),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_what_cannot_be_truncated_is_refused_before_anything_changes(kind: str) -> None:
    build, why = UNSUITABLE[kind]
    base = build()
    before = snapshot(base)
    for options in ({}, {"base_rank_pattern": {"layers.1": 3}, "r": 2}):
        with pytest.raises(ValueError, match=why):
            get_peft_model(base, cersa(target_modules=["layers.1"], **options))
        if kind != "meta":
            assert_unchanged(base, before)
        assert not layers_of(base)


def test_a_quantised_base_is_refused() -> None:
    base = quantise(chain(), "bitsandbytes-nf4")
    with pytest.raises(ValueError, match=r"it must be an nn\.Linear or Conv1D that is not quantised"):
        get_peft_model(base, cersa())
    assert not layers_of(base)


def test_a_weight_that_is_not_finite() -> None:
    base = chain()
    with torch.no_grad():
        base.layers[2].weight[0, 0] = float("nan")
    for options in ({}, {"base_rank_pattern": {"layers": 3}, "r": 2}):
        options = {"base_rank_pattern": {r"layers\.\d": 3}, "r": 2} if options else {}
        before = snapshot(base)
        with pytest.raises(ValueError, match="NaN or infinity"):
            get_peft_model(base, cersa(**options))
        assert_unchanged(base, before)


@pytest.mark.parametrize("loading", [False, True])
@pytest.mark.slow
def test_ctrl_c_at_any_line_leaves_the_base_whole(loading: bool, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)

    def run(base: Any, at: int) -> int:
        """Adapt until that line of the two files; returns how many lines ran."""
        lines = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename not in FILES:
                return None
            if event == "line":
                if lines == at:
                    raise KeyboardInterrupt
                lines += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            PeftModel.from_pretrained(base, tmp_path) if loading else get_peft_model(base, cersa())
        finally:
            sys.settrace(before)
        return lines

    count = run(chain(), -1)
    x = torch.randn(5, 24)
    for at in range(0, count, max(1, count // 50)):
        base = chain()
        with pytest.raises(KeyboardInterrupt):
            run(base, at)
        assert not any(isinstance(module, FactoredLinear) for module in base.modules()), at
        if not (loading and layers_of(base)):  # PEFT has loaded the adapter by then, and the next pass places it
            assert torch.equal(base(x), chain()(x)), at


def test_a_run_goes_on_from_its_own_state() -> None:
    model = adapted()
    x, state = torch.randn(5, 24), copy.deepcopy(model.state_dict())
    output, other = model(x), adapted(seed=2)
    other.load_state_dict(state)
    assert relative_error(other(x), output) < 1e-5
    assert relative_error(copy.deepcopy(model)(x), output) == 0
    assert relative_error(copy.deepcopy(model).double()(x.double()).float(), output) < 1e-5


def test_subspaces_do_not_move() -> None:
    from isotune.moving import MovingSchedule

    model = adapted().train()
    schedule = MovingSchedule(every=1)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    with pytest.raises(ValueError, match="truncate_base has truncated its weight"):
        schedule.step(model, optimizer)


def test_truncation_error_is_that_of_the_untrained_adapter() -> None:
    base = chain().train()
    before, batches = snapshot(base), [torch.randn(4, 24), torch.randn(3, 24)]
    found = truncation_error(base, cersa(), batches)
    assert_unchanged(base, before)
    model = get_peft_model(chain(), cersa())
    x = torch.cat(batches)
    expected = base(x)
    assert found.error == pytest.approx(relative_error(model(x), expected), rel=1e-4)
    assert found.worst == pytest.approx(max(relative_error(model(x), base(x)) for x in batches), rel=1e-4)
    assert [layer.rank for layer in found.layers] == [layer.base_layer.rank for layer in layers_of(model)]
    assert (found.before, found.after) == (
        sum(layer.weight.numel() for layer in base.layers),
        sum(numbers_of(layer.base_layer) for layer in layers_of(model)),
    )
    assert "outputs change by" in str(found)
    for config, data, why in (
        (CersaConfig(target_modules=["layers.0"]), batches, "truncates no weight"),
        (cersa(), [], "no batch"),
    ):
        with pytest.raises(ValueError, match=why):
            truncation_error(base, config, data)
    with pytest.raises(ValueError, match="has adapters already"):
        truncation_error(model, cersa(), batches)


def test_truncation_error_does_not_count_padding() -> None:
    base, config, tokens = llama(), cersa(target_modules=LLAMA), some_tokens()
    mask = torch.ones_like(tokens)
    plain = truncation_error(base, config, [{"input_ids": tokens, "attention_mask": mask}])
    padded = nn.functional.pad(tokens, (0, 3), value=1)
    batch = {"input_ids": padded, "attention_mask": nn.functional.pad(mask, (0, 3))}
    assert truncation_error(base, config, [batch]).error == pytest.approx(plain.error, rel=1e-4)
    assert 0.001 < plain.error < 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"base_energy": 0.9}, "set truncate_base=True"),
        ({"base_rank_pattern": {"0": 4}, "truncate_base": False}, "set truncate_base=True"),
        ({"truncate_base": True, "base_energy": 0.9, "base_rank_pattern": {"0": 4}}, "leave it or them out"),
        ({"truncate_base": True, "base_energy": 1.5}, r"base_energy=1.5.*in \(0, 1\]"),
        ({"truncate_base": True, "base_energy": 0.8, "rank_energy": 0.9}, "rank_energy=0.9.*base_energy=0.8"),
        ({"truncate_base": True, "rank_measure": "activations"}, "no meaning with base_energy"),
        ({"base_rank_pattern": {"0": 0}}, r"base_rank_pattern\['0'\]=0"),
        ({"base_rank_pattern": {"0": 4}, "accumulated_ranks": {"0": 2}, "basis": "embedded"}, "have moved"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        CersaConfig(**options)


def test_the_usual_energies() -> None:
    usual = CersaConfig(truncate_base=True)
    assert (usual.base_energy, usual.rank_energy) == (0.95, 0.95)
    assert CersaConfig(truncate_base=True, base_energy=0.9).rank_energy == 0.9


def test_a_core_beyond_what_is_kept_is_refused() -> None:
    base = chain()
    before = snapshot(base)
    with pytest.raises(
        ValueError, match=r"r=5 is too large for the module 'layers.0', of which truncate_base keeps k=4"
    ):
        get_peft_model(base, cersa(base_rank_pattern={"layers.0": 4}, r=5, target_modules=["layers.0"]))
    assert_unchanged(base, before)


def test_a_file_of_whole_weights_is_not_truncated(tmp_path: Path) -> None:
    move(get_peft_model(chain(), CersaConfig(r=2, target_modules=["layers.0"]))).save_pretrained(tmp_path)
    base = chain()
    with pytest.raises(ValueError, match="was trained on whole weights"):
        PeftModel.from_pretrained(base, tmp_path, truncate_base=True)
    assert not layers_of(base)


@pytest.mark.parametrize("case", ["new", "loaded", "loaded with other signs", "doubled", "copied", "a second one"])
@pytest.mark.parametrize("options", [{}, {"basis": "embedded"}], ids=["pinned", "embedded"])
@pytest.mark.parametrize("rank", [18, 20])
def test_no_factor_is_held_twice(
    case: str, options: dict[str, Any], rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's own factors are views of the layer's; at rank 18 of 20 both are filled up to 32."""

    def build() -> Any:
        return decaying(Chain(96, 64), 0.9)

    config = CersaConfig(r=rank, base_rank_pattern={"layers.0": 20}, target_modules=["layers.0"], **options)
    model = move(get_peft_model(build(), config)).eval()
    x = torch.randn(4, 96)
    expected = model(x)
    if "loaded" in case:
        model.save_pretrained(tmp_path)
        if "signs" in case:
            mixed = torch.where(torch.rand(20) < 0.5, -1.0, 1.0)

            def solve(*args: Any, **kwargs: Any) -> Any:
                found = principal_subspace(*args, **kwargs)
                object.__setattr__(found, "basis", found.basis * mixed[: len(found.basis), None])
                return found

            monkeypatch.setattr("isotune.subspace.solvers.principal_subspace", solve)
        model = PeftModel.from_pretrained(build(), tmp_path)
    elif case == "doubled":
        model, x, expected = model.double(), x.double(), expected.double()
    elif case == "copied":
        model = copy.deepcopy(model)
    elif case == "a second one":
        model.add_adapter("other", config)
        model.set_adapter("other")
        move(model)
    assert relative_error(model(x), expected) < 1e-5
    layer = only(model)
    for adapter in layer.isotune_operator.values():
        down, up = adapter.placement.factors
        assert len(down) == 32
        assert down.data_ptr() == layer.base_layer.right.data_ptr()
        assert up.data_ptr() == layer.base_layer.left.data_ptr()


def test_a_layer_alone(tmp_path: Path) -> None:
    """Called outside of the model, and by code that reads its weight."""
    model = adapted()
    layer, x = layers_of(model)[0], torch.randn(4, 24)
    with torch.no_grad():
        expected = x @ layer.weight.T + layer.base_layer.bias
    assert relative_error(layer(x), expected) < 1e-5
    assert only(nn.Sequential(layer)).weight.shape == (32, 24)
