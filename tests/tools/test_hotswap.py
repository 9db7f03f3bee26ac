"""A running adapter is exchanged in place, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import (
    OPTIONS_FOR_12,
    OneLayer,
    adapt,
    counted,
    layers_of,
    psoft,
    randomize,
    relative_error,
    some_tokens,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    transformers_takes_peft,
)
from isotune import get_peft_model, hotswap_adapter
from isotune.errors import AdapterFileError, BaseMismatchError
from isotune.methods import METHODS
from isotune.methods.config import IsotuneConfig
from isotune.subspace.solvers import principal_subspace
from quantisers import parameters, quantise

OPTIONS = {**OPTIONS_FOR_12, "oft": {"oft_block_size": 8}}
TOKENS = some_tokens()


def config(method: str = "psoft", **options: Any) -> IsotuneConfig:
    return METHODS[method](**{"target_modules": ["q_proj", "down_proj"], **OPTIONS[method], **options})


def saved(folder: Path, settings: IsotuneConfig, seed: int, base: Callable[[], nn.Module] = tiny_llama) -> Path:
    """The folder of an adapter that looks trained."""
    model = get_peft_model(base(), settings)
    randomize(model, std=0.3, seed=seed)
    model.save_pretrained(str(folder))
    return folder


def loaded(folder: Path, base: Callable[[], nn.Module] = tiny_llama) -> PeftModel:
    return PeftModel.from_pretrained(base(), str(folder)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS).logits
    return result


def state(model: nn.Module) -> dict[str, tuple[int, int, Tensor]]:
    """Where every tensor lies, and what it holds."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(t), t.data_ptr(), t.detach().clone()) for name, t in named}


def assert_same_places(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert {n: place[:2] for n, place in before.items()} == {n: place[:2] for n, place in after.items()}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.slow
def test_the_numbers_change_and_the_tensors_stay(method: str, tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), config(method), seed) for seed in (1, 2))
    model, expected = loaded(first), logits(loaded(second))
    assert relative_error(logits(model), expected) > 1e-2
    before = state(model)
    hotswap_adapter(model, second)
    assert relative_error(logits(model), expected) < 1e-6
    assert_same_places(before, state(model))
    model.save_pretrained(str(tmp_path / "again"))
    assert relative_error(logits(loaded(tmp_path / "again")), expected) < 1e-6
    hotswap_adapter(model, first)
    assert relative_error(logits(model), logits(loaded(first))) < 1e-6


def turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the solver return other signs and another order, as another LAPACK driver may."""

    def solve(*args: Any, **kwargs: Any) -> Any:
        found = principal_subspace(*args, **kwargs)
        mixing = torch.linalg.qr(torch.randn(len(found.basis), len(found.basis))).Q
        object.__setattr__(found, "basis", mixing @ found.basis)
        return found

    monkeypatch.setattr("isotune.subspace.solvers.principal_subspace", solve)


@pytest.mark.parametrize("options", [{}, {"basis": "embedded"}, {"ab_svd_init": "pissa_init"}, {"basis_seed": 3}])
def test_another_basis_is_found_again_on_this_base(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second adapter was trained in other coordinates: its pin is recovered, reader and writer stay in place."""
    old = {**options, "basis_seed": 0}
    with monkeypatch.context() as patch:
        turned(patch)
        second = saved(tmp_path / "second", config(**options), 2)
    model, expected = loaded(saved(tmp_path / "first", config(**old), 1)), logits(loaded(second))
    before = state(model)
    hotswap_adapter(model, second)
    assert relative_error(logits(model), expected) < 1e-4
    assert_same_places(before, state(model))
    model.load_state_dict(model.state_dict())  # the configuration knows how to find it again
    assert relative_error(logits(model), expected) < 1e-4


def test_the_same_pin_needs_no_solving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (saved(tmp_path / str(seed), config(), seed) for seed in (1, 2))
    model = loaded(first)
    with counted(monkeypatch, "isotune.subspace.solvers.principal_subspace") as calls:
        hotswap_adapter(model, second)
    assert not calls


def test_another_adapter_that_shares_the_basis_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_llama(), config()).eval()
    model.add_adapter("other", config())
    randomize(model, "other", std=0.3)
    layer = layers_of(model)[0]
    assert layer.adapter("default").placement.down is layer.adapter("other").placement.down
    with monkeypatch.context() as patch:
        turned(patch)
        second = saved(tmp_path / "second", config(), 2)
    model.set_adapter("other")
    other = logits(model)
    hotswap_adapter(model, second)
    assert torch.equal(logits(model), other)
    model.set_adapter("default")
    assert relative_error(logits(model), logits(loaded(second))) < 1e-4


def test_saved_modules_and_biases_come_along(tmp_path: Path) -> None:
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "isotune_only"}
    folders = []
    for seed in (1, 2):
        model = get_peft_model(tiny_bert(), psoft(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(str(tmp_path / str(seed)))
        folders.append(tmp_path / str(seed))
    model, expected = loaded(folders[0], tiny_bert), logits(loaded(folders[1], tiny_bert))
    before = state(model)
    hotswap_adapter(model, folders[1])
    assert relative_error(logits(model), expected) < 1e-6
    assert_same_places(before, state(model))


@pytest.mark.parametrize("method", ["psoft", "oft", "boft"])
def test_convolutions_and_embeddings(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def base() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Embedding(19, 16), nn.Conv1d(7, 16, 8), nn.Conv1d(16, 5, 1))

    settings = config(method, target_modules=["0", "2"])
    with monkeypatch.context() as patch:
        turned(patch)
        second = saved(tmp_path / "second", settings, 2, base)
    model, expected = loaded(saved(tmp_path / "first", settings, 1, base), base), loaded(second, base)
    tokens = torch.arange(14).reshape(2, 7)
    before = state(model)
    hotswap_adapter(model, second)
    with torch.no_grad():
        assert relative_error(model(tokens), expected(tokens)) < 1e-4
    assert_same_places(before, state(model))


@pytest.mark.parametrize("name", parameters())
def test_a_quantised_base(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin of the new adapter is found on the very weights that the old one's was found on."""

    def base() -> nn.Module:
        torch.manual_seed(4)
        return quantise(OneLayer(nn.Linear(96, 64)), name)

    settings = config("psoft", target_modules=["layer"])
    with monkeypatch.context() as patch:
        turned(patch)
        second = saved(tmp_path / "second", settings, 2, base)
    model, expected = loaded(saved(tmp_path / "first", settings, 1, base), base), loaded(second, base)
    x = torch.randn(3, 96)
    before = state(model)
    hotswap_adapter(model, second)
    with torch.no_grad():
        assert relative_error(model(x), expected(x)) < 1e-3
    assert_same_places(before, state(model))


@transformers_takes_peft
def test_a_model_of_transformers_and_a_scale(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), psoft(target_modules=["c_attn"]), seed, tiny_gpt2) for seed in (1, 2))
    model = tiny_gpt2()
    model.load_adapter(str(first), adapter_name="mine")
    for layer in layers_of(model):
        layer.set_scale("mine", 0.5)
    hotswap_adapter(model, second, "mine")
    half = loaded(second, tiny_gpt2)
    for layer in layers_of(half):
        layer.set_scale("default", 0.5)
    assert relative_error(logits(model), logits(half)) < 1e-6


REFUSED: dict[str, tuple[IsotuneConfig, type[Exception], str]] = {
    "method": (config("oft"), ValueError, "ISOTUNE_OFT.*isotune.load_adapter"),
    "rank": (config(r=5), AdapterFileError, r"\(10,\) in the adapter file, and \(6,\) is needed for the adapter"),
    "fewer": (config(target_modules=["q_proj"]), ValueError, "adapts other modules .* it lacks"),
    "more": (config(target_modules=["q_proj", "down_proj", "v_proj"]), ValueError, "adds .*v_proj'"),
    "basis": (config(basis="embedded"), AdapterFileError, "has no .*pin"),
    "series": (config(use_cayley_neumann=True), ValueError, "use_cayley_neumann=True instead of False"),
    "split": (config(ab_svd_init="pissa_init"), ValueError, "ab_svd_init='pissa_init' instead of 'psoft_init'"),
    "saved": (config(modules_to_save=["lm_head"]), AdapterFileError, "lm_head.weight', which 'default' does not have"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_leaves_the_running_adapter(case: str, tmp_path: Path) -> None:
    settings, kind, message = REFUSED[case]
    model = loaded(saved(tmp_path / "first", config(), 1))
    folder = saved(tmp_path / "second", settings, 2)
    before, expected, options = state(model), logits(model), model.peft_config["default"].to_dict()
    with pytest.raises(kind, match=message):
        hotswap_adapter(model, folder)
    after = state(model)
    assert_same_places(before, after)
    assert all(torch.equal(before[name][2], after[name][2]) for name in before)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].to_dict() == options


def test_other_refusals(tmp_path: Path) -> None:
    def other_base() -> nn.Module:
        model = tiny_llama()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * parameter.std())
        return model

    first = saved(tmp_path / "first", config(), 1)
    foreign = saved(tmp_path / "foreign", config(), 2, other_base)
    model = loaded(first)
    expected = logits(model)
    with pytest.raises(BaseMismatchError, match="was not trained on this base model"):
        hotswap_adapter(model, foreign)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"no isotune adapter 'missing'.*'default'"):
        hotswap_adapter(model, first, "missing")
    with pytest.raises(ValueError, match=r"no isotune adapter 'default'.*none"):
        hotswap_adapter(tiny_llama(), first)
    with pytest.raises(AdapterFileError, match="not a folder"):
        hotswap_adapter(model, tmp_path / "nothing")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, first)
    model.unmerge_adapter()
    model.peft_config["default"].on_base_mismatch = "warn"
    with pytest.warns(UserWarning, match="was not trained on this base model"):
        hotswap_adapter(model, foreign)


def test_in_inference_mode(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), config(), seed) for seed in (1, 2))
    with torch.inference_mode():
        model = loaded(first)
        model(input_ids=TOKENS)
    hotswap_adapter(model, second)
    with torch.inference_mode():
        assert relative_error(model(input_ids=TOKENS).logits, logits(loaded(second))) < 1e-6


def test_under_a_server_with_threads(tmp_path: Path) -> None:
    """With the lock that the server holds around each batch, an answer is that of one adapter or the other."""
    folders = [saved(tmp_path / str(seed), config(), seed) for seed in (1, 2)]
    answers = [logits(loaded(folder)) for folder in folders]
    model, lock = loaded(folders[0]), threading.Lock()

    def answer(_: int) -> Tensor:
        with lock:
            return logits(model)

    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(answer, i) for i in range(24)]
        for turn in range(6):
            hotswap_adapter(model, folders[(turn + 1) % 2], lock=lock)
        for result in results:
            assert min(relative_error(result.result(), right) for right in answers) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_a_compiled_model_is_not_compiled_again(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def base() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))

    settings = config(method, target_modules=["0", "2"])
    with monkeypatch.context() as patch:
        turned(patch)
        second = saved(tmp_path / "second", settings, 2, base)
    model = loaded(saved(tmp_path / "first", settings, 1, base), base)
    x = torch.randn(5, 24)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5
        graphs = counter.frame_count
        hotswap_adapter(compiled, second)
        assert relative_error(compiled(x), loaded(second, base)(x)) < 1e-4
        assert counter.frame_count == graphs > 0
    torch._dynamo.reset()


def test_a_model_without_peft_around_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "first", config(), 1)
    model = adapt(tiny_llama(), config())
    hotswap_adapter(model.get_base_model(), folder)
    assert relative_error(logits(model), logits(loaded(folder))) < 1e-6
