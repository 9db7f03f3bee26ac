"""An adapter file means the same everywhere: in other processes, with other drivers and threads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isotune.tuner.placing
from helpers import (
    FAMILIES,
    TARGETS,
    adapt,
    assert_unchanged,
    down_of,
    layers_of,
    psoft,
    randomize,
    relative_error,
    snapshot,
    some_tokens,
    tiny_llama,
)
from isotune import get_peft_model
from isotune.errors import AdapterFileError, BaseMismatchError, IsotuneWarning
from isotune.subspace.result import Subspace, SubspaceRequest
from isotune.subspace.solvers import principal_subspaces
from scripts import printed_by

FILE = "adapter_model.safetensors"


def clustered(out_features: int, in_features: int, rank: int) -> Tensor:
    """A weight whose singular values come in nearly equal groups, one of which straddles the cut at `rank`."""
    size = min(out_features, in_features)
    left = torch.linalg.qr(torch.randn(out_features, size, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_features, size, dtype=torch.float64)).Q
    values = torch.linspace(5.0, 1.0, size, dtype=torch.float64)
    for start in range(0, size - 3, 4):
        values[start : start + 3] = values[start] * (1 + 1e-7 * torch.arange(3, dtype=torch.float64))
    values[rank - 1 : rank + 2] = values[rank]
    return ((left * values) @ right.T).float()


def base() -> nn.Module:
    """A model with generic and with clustered spectra, always the same."""
    torch.manual_seed(21)
    model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, 40))
    with torch.no_grad():
        model[2].weight.copy_(clustered(30, 48, 8))
    return model


def adapted(**options: Any) -> Any:
    return adapt(base(), target_modules=["0", "2", "4"], **options)


def updates(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    return [layer.get_delta_weight(adapter) for layer in layers_of(model)]


def assert_same_updates(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> None:
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= tolerance


# -- the same base, found in another way ---------------------------------------------------------------------------


def gesvd(weight: Tensor, rank: int, found: Subspace) -> Tensor:
    _, _, right = scipy.linalg.svd(weight.double().numpy(), full_matrices=False, lapack_driver="gesvd")
    return torch.from_numpy(right[:rank].copy())


def gesvd_in_single_precision(weight: Tensor, rank: int, found: Subspace) -> Tensor:
    _, _, right = scipy.linalg.svd(weight.float().numpy(), full_matrices=False, lapack_driver="gesvd")
    return torch.from_numpy(right[:rank].copy())


def flipped(weight: Tensor, rank: int, found: Subspace) -> Tensor:
    signs = torch.where(torch.arange(rank) % 2 == 0, -1.0, 1.0)
    return found.basis * signs[:, None]


def mixed(weight: Tensor, rank: int, found: Subspace) -> Tensor:
    """Signs flipped, and any vectors whose singular values are equal to 1e-4 turned into each other at random."""
    generator = torch.Generator().manual_seed(4)
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    right = right.clone()
    start = 0
    while start < len(values):
        stop = start + 1
        while stop < len(values) and values[stop] > values[start] * (1 - 1e-4):
            stop += 1
        noise = torch.randn(stop - start, stop - start, generator=generator, dtype=torch.float64)
        right[start:stop] = torch.linalg.qr(noise).Q @ right[start:stop]
        start = stop
    return right[:rank]


SOLVERS = [gesvd, gesvd_in_single_precision, flipped, mixed]


def replace_solver(monkeypatch: pytest.MonkeyPatch, other: Callable[[Tensor, int, Subspace], Tensor]) -> None:
    """What the layers get as the principal subspace is `other` of it from now on."""

    def solve(requests: list[SubspaceRequest], **options: Any) -> list[Subspace]:
        results = []
        for request, found in zip(requests, principal_subspaces(requests, **options), strict=True):
            weight = request.weight if isinstance(request.weight, Tensor) else request.weight()
            basis = other(weight, request.rank, found).to(found.basis)
            results.append(replace(found, basis=basis.contiguous()))
        return results

    monkeypatch.setattr(isotune.tuner.placing, "principal_subspaces", solve)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("init", ["psoft_init", "pissa_init"])
def test_another_solver(
    solver: Callable[..., Tensor], init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(ab_svd_init=init)
    expected = updates(model)
    model.save_pretrained(tmp_path)
    replace_solver(monkeypatch, solver)
    # Without the pin it would be another adapter: the test can fail.
    fresh = adapted(ab_svd_init=init)
    for layer, trained in zip(layers_of(fresh), layers_of(model), strict=True):
        layer.adapter("default").load_state_dict(trained.adapter("default").state_dict())
    if solver in (flipped, mixed):
        assert max(relative_error(a, b) for a, b in zip(updates(fresh), expected, strict=True)) > 0.1
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert_same_updates(updates(loaded), expected)
    assert max(layer.adapter("default").placement.residual for layer in layers_of(loaded)) < 1e-3
    x = torch.randn(5, 40)
    assert relative_error(loaded(x), model(x)) < 1e-3


@pytest.mark.parametrize("solver", [mixed])
def test_another_solver_before_and_the_usual_one_after(
    solver: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        replace_solver(patch, solver)
        model = adapted()
    expected = updates(model)
    model.save_pretrained(tmp_path)
    assert_same_updates(updates(PeftModel.from_pretrained(base(), tmp_path)), expected)


@pytest.mark.slow
def test_a_new_process_with_any_number_of_threads(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    script = """
import sys, torch
from test_portability import PeftModel, base, updates
for threads in (1, 2):
    torch.set_num_threads(threads)
    found = updates(PeftModel.from_pretrained(base(), f"{sys.argv[1]}/adapter"))
    torch.save(found, f"{sys.argv[1]}/found-{threads}.pt")
"""
    printed_by(script, str(tmp_path), folder=tmp_path)
    for threads in (1, 2):
        assert_same_updates(torch.load(tmp_path / f"found-{threads}.pt"), updates(model))


def test_the_pin_survives_many_generations_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load under another solver, train on, save, load: errors must not grow."""
    model = adapted()
    expected = updates(model)
    for generation, solver in enumerate([mixed, flipped, gesvd, mixed]):
        model.save_pretrained(tmp_path / str(generation))
        with monkeypatch.context() as patch:
            replace_solver(patch, solver)
            model = PeftModel.from_pretrained(base(), tmp_path / str(generation), is_trainable=True)
    assert_same_updates(updates(model), expected)


def test_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the update but its derivative is the same after loading under another solver."""
    model = adapted()
    model.save_pretrained(tmp_path)
    replace_solver(monkeypatch, mixed)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    x = torch.randn(6, 40)
    for each in (model, loaded):
        each(x).square().mean().backward()
    for ours, theirs in zip(layers_of(model), layers_of(loaded), strict=True):
        for found, expected in zip(
            theirs.adapter("default").parameters(), ours.adapter("default").parameters(), strict=True
        ):
            assert relative_error(found.grad, expected.grad) < 2e-3


# -- another base --------------------------------------------------------------------------------------------------


def quantised(weight: Tensor, block: int = 32) -> Tensor:
    """Rounded to 4 bits in blocks along the input, as NF4 and Q4 do in effect."""
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % block))
    blocks = padded.view(weight.shape[0], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return (torch.round(blocks / scale) * scale).view_as(padded)[:, : weight.shape[1]]


def unrelated(weight: Tensor) -> Tensor:
    return torch.randn_like(weight) * weight.std()


OTHER_BASES = [quantised, unrelated]


def other_base(change: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES["opt"]()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                projection.weight.copy_(change(projection.weight))
    return model


@pytest.fixture
def opt_adapter(tmp_path: Path) -> Path:
    model = adapt(FAMILIES["opt"](), target_modules=TARGETS["opt"])
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("change", OTHER_BASES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False])
def test_another_base_is_refused_and_left_as_it_was(
    change: Callable[[Tensor], Tensor], low_cpu_mem_usage: bool, opt_adapter: Path
) -> None:
    model = other_base(change)
    before, tokens = snapshot(model), some_tokens()
    expected = model(tokens).logits
    said = r"model\.decoder\.layers\.\d\.self_attn\..*residual of \d\.\d+(?!.*modules_to_save)"
    with pytest.raises(BaseMismatchError, match=said):
        PeftModel.from_pretrained(model, opt_adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(model, before)
    assert torch.equal(model(tokens).logits, expected)
    get_peft_model(model, psoft(target_modules=TARGETS["opt"]))(tokens)  # and may be adapted afterwards


def test_the_refusal_names_the_worst_layer(opt_adapter: Path) -> None:
    model = FAMILIES["opt"]()
    with torch.no_grad():
        projection = model.model.decoder.layers[1].self_attn.v_proj
        projection.weight.copy_(unrelated(projection.weight))
    with pytest.raises(
        BaseMismatchError, match=r"1 of 4 layers.*'model\.decoder\.layers\.1\.self_attn\.v_proj'.*modules_to_save"
    ):
        PeftModel.from_pretrained(model, opt_adapter)


def test_a_second_adapter_that_is_refused_leaves_the_first_alone(opt_adapter: Path) -> None:
    model = adapt(other_base(unrelated), target_modules=TARGETS["opt"])
    tokens = some_tokens()
    expected, before = model(tokens).logits, snapshot(model.get_base_model())
    with pytest.raises(BaseMismatchError, match="'second'"):
        model.load_adapter(str(opt_adapter), adapter_name="second")
    assert_unchanged(model.get_base_model(), before)
    assert torch.equal(model(tokens).logits, expected)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    model.save_pretrained(opt_adapter / "again")
    assert not (opt_adapter / "again" / "second").exists()


@pytest.mark.parametrize("change", OTHER_BASES)
def test_another_base_is_taken_with_a_warning_when_asked_for(
    change: Callable[[Tensor], Tensor], opt_adapter: Path
) -> None:
    with pytest.warns(IsotuneWarning, match="not trained on this base"):
        model = PeftModel.from_pretrained(other_base(change), opt_adapter, on_base_mismatch="warn")
    logits = model(some_tokens()).logits
    assert bool(torch.isfinite(logits).all())
    assert max(layer.adapter("default").placement.residual for layer in layers_of(model)) > 0.03
    reader = down_of(layers_of(model)[0])
    torch.testing.assert_close(reader @ reader.T, torch.eye(8), rtol=0, atol=1e-5)
    model.save_pretrained(opt_adapter / "again")
    assert "on_base_mismatch" not in (opt_adapter / "again" / "adapter_config.json").read_text()


def test_embedded_is_exact_on_any_base(tmp_path: Path) -> None:
    model = adapt(FAMILIES["opt"](), target_modules=TARGETS["opt"], basis="embedded")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["opt"](), tmp_path)
    for found, expected in zip(updates(loaded), updates(model), strict=True):
        assert relative_error(found, expected) <= 1e-6
    # On another base the basis is the stored one exactly, and the update is that of its definition.
    other = PeftModel.from_pretrained(other_base(unrelated), tmp_path)
    for ours, theirs in zip(layers_of(other), layers_of(model), strict=True):
        assert torch.equal(down_of(ours, "default"), down_of(theirs, "default"))
        basis = down_of(ours, "default").double()
        change = ours.adapter("default").matrix().detach().double() - torch.eye(8)
        expected = (ours.host.matrix().double() @ basis.T) @ change.T @ basis
        assert relative_error(ours.get_delta_weight("default"), expected) <= 1e-5


@pytest.mark.slow
def test_minilm_rounded_to_bfloat16(tmp_path: Path) -> None:
    from test_user_paths import minilm

    model = adapt(minilm(), target_modules=["query", "value"], r=46)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(minilm().bfloat16(), tmp_path)
    residuals = [layer.adapter("default").placement.residual for layer in layers_of(loaded)]
    assert 1e-3 < max(residuals) <= 0.03
    for found, expected in zip(updates(loaded), updates(model), strict=True):
        assert relative_error(found, expected) <= 5e-2
    same = PeftModel.from_pretrained(minilm(), tmp_path)
    assert_same_updates(updates(same), updates(model))


# -- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [32, 46, 64, 128])
def test_a_pinned_file_is_at_most_four_times_what_is_trained(rank: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 384), nn.Linear(384, 200))
    model = adapt(model, target_modules=["0", "1"], r=rank, psoft_svd="full")
    model.save_pretrained(tmp_path)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (tmp_path / FILE).stat().st_size <= 4 * trained


# -- damaged files -------------------------------------------------------------------------------------------------


def damage(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE)


def without(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state.pop(next(name for name in state if part in name))

    return change


def reshaped(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        name = next(name for name in state if part in name)
        state[name] = torch.cat([state[name], state[name]], dim=-1)

    return change


def poisoned(part: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[next(name for name in state if part in name)].view(-1)[3] = value

    return change


def zeroed_pin(state: dict[str, Tensor]) -> None:
    state[next(name for name in state if "pin" in name)].zero_()


DAMAGES = {
    "no generator": (without("generator"), "generator"),
    "no scale": (without("output_scale"), "output_scale"),
    "no pin": (without("pin"), "pin"),
    "wrong generator": (reshaped("generator"), "shape"),
    "wrong pin": (reshaped("pin"), "shape"),
    "NaN in generator": (poisoned("generator", float("nan")), "NaN"),
    "infinity in scale": (poisoned("input_scale", float("inf")), "infinity"),
    "NaN in pin": (poisoned("pin", float("nan")), "NaN"),
    "zero pin": (zeroed_pin, "pin"),
    "empty": (lambda state: state.clear(), "has no"),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_file_gives_one_clear_error(kind: str, opt_adapter: Path) -> None:
    change, message = DAMAGES[kind]
    damage(opt_adapter, change)
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(FAMILIES["opt"](), opt_adapter)


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_file_leaves_the_base_as_it_was(kind: str, opt_adapter: Path) -> None:
    damage(opt_adapter, DAMAGES[kind][0])
    model = FAMILIES["opt"]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"\w+"):
        PeftModel.from_pretrained(model, opt_adapter)
    assert_unchanged(model, before)


@pytest.mark.parametrize("size", [0, 5, 300])
def test_a_truncated_file_gives_one_clear_error(size: int, opt_adapter: Path) -> None:
    (opt_adapter / FILE).write_bytes((opt_adapter / FILE).read_bytes()[:size])
    model = FAMILIES["opt"]()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=r"damaged|incomplete|truncated"):
        PeftModel.from_pretrained(model, opt_adapter)
    assert_unchanged(model, before)


def test_a_later_format_is_refused(opt_adapter: Path) -> None:
    config = opt_adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"isotune_format": 1', '"isotune_format": 99'))
    with pytest.raises(AdapterFileError, match=r"version 99.*pip install -U"):
        PeftModel.from_pretrained(FAMILIES["opt"](), opt_adapter)


def test_a_damaged_second_adapter_leaves_the_first_alone(opt_adapter: Path) -> None:
    damage(opt_adapter, poisoned("generator", float("nan")))
    model = adapt(FAMILIES["opt"](), target_modules=TARGETS["opt"])
    before, expected = snapshot(model.get_base_model()), model(some_tokens()).logits
    with pytest.raises(AdapterFileError, match="NaN"):
        model.load_adapter(str(opt_adapter), adapter_name="second")
    assert_unchanged(model.get_base_model(), before)
    assert torch.equal(model(some_tokens()).logits, expected)
    assert list(model.peft_config) == ["default"]


def test_the_file_does_not_depend_on_the_dtype_or_the_merge_state_of_the_model(tmp_path: Path) -> None:
    model = adapt(tiny_llama(), target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "plain")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "plain" / FILE).read_bytes() == (tmp_path / "merged" / FILE).read_bytes()
    half = copy.deepcopy(model)
    half.unmerge_adapter()
    half.bfloat16().save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / FILE)
    original = load_file(tmp_path / "plain" / FILE)
    for name, tensor in original.items():
        if "pin" in name:
            assert torch.equal(stored[name], tensor), name


def test_the_update_changes_when_the_operator_does(tmp_path: Path) -> None:
    """The comparisons above can fail: a little training is far above their tolerance."""
    model = adapted()
    before = updates(model)
    randomize(model, std=0.02)
    assert all(relative_error(a, b) > 5e-3 for a, b in zip(updates(model), before, strict=True))
