"""UORA: its random matrices, what the layers share, its start, its file, and what is refused."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, VeraConfig
from torch import nn

from helpers import Chain, assert_unchanged, error_of_update, layers_of, move, relative_error, snapshot
from isotune import UoraConfig, get_peft_model, hotswap_adapter
from isotune.adapter.shared import SharedAdapter
from isotune.diagnostics.inspect import inspect
from isotune.errors import AdapterFileError
from isotune.files.export_lora import export_lora
from isotune.subspace import random_rows
from isotune.subspace.random_rows import RandomRows

SIZES = (12, 20, 12, 20)
"""Two layers of one shape, and one of its transpose."""
RANK = 6


def model_of(*sizes: int, seed: int = 0, **options: Any) -> Any:
    config = UoraConfig(**{"r": RANK, "target_modules": r"(.*\.)?layers\.\d+", **options})
    return get_peft_model(Chain(*(sizes or SIZES), seed=seed), config)


def adapters(model: nn.Module) -> list[SharedAdapter]:
    return [layer.adapter("default") for layer in layers_of(model)]  # type: ignore[misc]


# -- the random matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "width"), [(5, 12), (12, 5), (7, 7)])
def test_the_matrices_start_orthonormal_and_follow_from_the_seed(rank: int, width: int) -> None:
    matrix = RandomRows(3, 1, rank, width).matrix()
    gram = matrix @ matrix.T if rank <= width else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(min(rank, width)), atol=1e-6, rtol=0)
    drawn = np.random.RandomState([3, 1]).standard_normal((rank, width))
    factor, upper = np.linalg.qr(drawn if rank > width else drawn.T)
    expected = factor * np.sign(np.diag(upper))
    torch.testing.assert_close(matrix, torch.from_numpy(expected if rank > width else expected.T).float())
    for other in (RandomRows(4, 1, rank, width), RandomRows(3, 0, rank, width)):
        assert relative_error(other.matrix(), matrix) > 0.5


@pytest.mark.parametrize("width", [30, 4])
def test_a_row_is_interpolated_and_its_history_is_the_counts(width: int) -> None:
    """In whatever order, and from the beginning as well as from the last matrix."""
    start = RandomRows(0, 0, 6, width)
    before = start.matrix().clone()
    once, first = start.reinitialised([1, 4], 0.25)
    assert torch.equal(first[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    new = (first[[1, 4]] - 0.75 * before[[1, 4]]) / 0.25
    lengths = torch.linalg.vector_norm(new, dim=1)
    assert torch.allclose(lengths, torch.ones(2), atol=1e-5) if width == 30 else bool((lengths < 1).all())
    assert abs(float(new[0] @ new[1]) / float(lengths.prod())) < 0.999
    twice, second = once.reinitialised([4], 0.25)
    assert twice.counts == (0, 1, 0, 0, 2, 0)
    assert not torch.allclose(second[4], first[4])
    assert torch.equal(second[1], first[1])
    key, kept = twice, second.clone()
    del first, second
    gc.collect()
    assert torch.equal(key.matrix(), kept)  # made anew, to the bit
    other = start.reinitialised([4], 0.25)[0].reinitialised([4], 0.25)[0].reinitialised([1], 0.25)
    assert other[0] == twice
    assert torch.equal(other[1], kept)


def test_all_layers_of_a_shape_share_their_matrices_and_models_let_them_go() -> None:
    model = model_of(seed=0, projection_prng_key=77)
    model(torch.randn(3, 12))
    first, second, third = (adapter.matrices(torch.float32, torch.device("cpu")) for adapter in adapters(model))
    assert first[0].data_ptr() == third[0].data_ptr()
    assert first[1].data_ptr() == third[1].data_ptr()
    # A (r, 12) and Bᵀ (r, 12) have one shape, but are not one matrix.
    assert first[0].shape == second[1].T.shape
    assert relative_error(first[0], second[1].T) > 0.5
    assert not [
        name for name, tensor in model.state_dict().items() if tensor.numel() >= RANK * 12 and "isotune" in name
    ]
    copied = adapters(copy.deepcopy(model))[0].matrices(torch.float32, torch.device("cpu"))
    assert copied[0].data_ptr() == first[0].data_ptr()

    def held() -> int:
        return sum(key[0].seed == 77 for key in random_rows._MADE)

    model.to(torch.bfloat16)(torch.randn(3, 12).bfloat16())
    del first, second, third, copied
    gc.collect()
    assert held() == 8  # A and B of two widths each, in float32 and in bfloat16
    del model
    gc.collect()
    assert held() == 0


@pytest.mark.slow
def test_compiled_code_has_the_matrices_of_a_copied_or_loaded_model(tmp_path: Path) -> None:
    """It cannot make them itself, and a copy has them before it was ever called."""
    model = renewed(move(model_of()))
    model.save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), PeftModel.from_pretrained(Chain(*SIZES), tmp_path)):
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(torch.ones(2, 12)), model(torch.ones(2, 12)))


def test_the_update_is_that_of_pefts_vera_on_these_matrices() -> None:
    ours, x = move(model_of(12, 20)), torch.randn(5, 12)
    theirs: Any = peft.get_peft_model(Chain(12, 20), VeraConfig(r=RANK, target_modules=["layers.0"]))
    (adapter,), layer = adapters(ours), theirs.base_model.model.layers[0]
    down, up = adapter.matrices(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        layer.vera_A["default"].copy_(down)
        layer.vera_B["default"].copy_(up)
        layer.vera_lambda_d["default"].copy_(adapter.vera_lambda_d)
        layer.vera_lambda_b["default"].copy_(adapter.vera_lambda_b)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(adapter.vera_lambda_d.grad, layer.vera_lambda_d["default"].grad)
    torch.testing.assert_close(adapter.vera_lambda_b.grad, layer.vera_lambda_b["default"].grad)


# -- the file ------------------------------------------------------------------------------------------------------


def renewed(model: Any, rows: tuple[int, ...] = (0, 3, 3)) -> Any:
    """The model after boundaries at which one row each was re-initialised."""
    for number, row in enumerate(rows, 1):
        for adapter in adapters(model):
            renewal = adapter.renewed([row], number, 0.5)  # holds the new matrices until they are taken over
            adapter.hold(renewal.buffers)
            adapter.refresh()
    return model


def test_saved_loaded_swapped_and_exported(tmp_path: Path) -> None:
    model, x = renewed(move(model_of())), torch.randn(5, 12)
    expected, base = model(x).detach(), Chain(*SIZES)(x)
    model.save_pretrained(tmp_path / "file")
    plain = move(model_of())(x).detach()
    assert error_of_update(plain, expected, base) > 1e-2  # the same vectors on the first matrices
    loaded = PeftModel.from_pretrained(Chain(*SIZES), tmp_path / "file")
    assert torch.equal(loaded(x), expected)
    assert adapters(loaded)[0].reinitializations.tolist() == [1, 0, 0, 2, 0, 0]
    swapped = move(model_of(), seed=5)
    swapped(x)
    hotswap_adapter(swapped, tmp_path / "file")
    assert torch.equal(swapped(x), expected)
    again = model_of()
    again(x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)
    export_lora(tmp_path / "file", tmp_path / "lora", base=Chain(*SIZES))
    lora = PeftModel.from_pretrained(Chain(*SIZES), tmp_path / "lora")
    assert error_of_update(lora(x), expected, base) < 1e-5
    assert lora.peft_config["default"].r == RANK
    report = inspect(tmp_path / "file", base=Chain(*SIZES))
    assert report.parameters == sum(RANK + out for out in SIZES[1:])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("reinitializations", -1.0, "whole numbers of at least 0"),
        ("reinitializations", 0.5, "whole numbers of at least 0"),
        ("reinit_boundary", -3.0, "whole numbers of at least 0"),
        ("reinit_weight", 1.5, "from 0 to 1"),
    ],
)
def test_a_damaged_history_is_refused(name: str, value: float, said: str, tmp_path: Path) -> None:
    model = model_of()
    getattr(adapters(model)[1], name).fill_(value)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=said):
        PeftModel.from_pretrained(Chain(*SIZES), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("reinitializations", 1e9), ("reinit_boundary", 1.0), ("reinit_weight", 0.0)]
)
def test_a_history_that_contradicts_itself_is_refused(name: str, value: float, tmp_path: Path) -> None:
    """A count of 1e9 would be a load of hours."""
    model = renewed(model_of())
    getattr(adapters(model)[1], name).data.fill_(value)
    model.save_pretrained(tmp_path)
    base = Chain(*SIZES)
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match="says that a row was re-initialised"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_another_seed_is_refused_for_a_swap(tmp_path: Path) -> None:
    model_of(projection_prng_key=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="projection_prng_key=1 instead of 0"):
        hotswap_adapter(model_of(), tmp_path)


def test_the_history_is_not_rounded_when_a_model_is_cast() -> None:
    model = renewed(move(model_of()), tuple([2] * 300))
    model.to(torch.bfloat16).float()
    assert adapters(model)[0].reinitializations.tolist() == [0, 0, 300, 0, 0, 0]
    assert model(torch.ones(1, 12)).dtype == torch.float32


def test_a_mean_is_refused() -> None:
    model = move(model_of())
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(ValueError, match="no mean of the same form"):
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r=0"),
        ({"d_initial": 0.0}, "above 0"),
        ({"vera_dropout": 1.0}, "vera_dropout"),
        ({"projection_prng_key": -1}, "from 0 to 4294967295"),
        ({"rank_budget": 1000}, "no meaning with UoraConfig"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UoraConfig(**options)


@pytest.mark.parametrize("start", ["meta", "cpu"])
def test_what_uninitialised_memory_holds_is_no_history(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`to_empty` leaves any numbers until the state is loaded; as a history they could take hours to follow."""
    full = renewed(move(model_of()))
    model = model_of().to(start)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty(*args, **kwargs).fill_(1e9))
    model.to_empty(device="cpu")
    monkeypatch.undo()
    model.load_state_dict(full.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(model(x), full(x))
