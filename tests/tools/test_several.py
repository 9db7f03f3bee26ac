"""Many adapters in one model: mixed batches in forward and generation, and adapters of different methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import (
    OPTIONS_FOR_TINY,
    Chain,
    OneLayer,
    adapt,
    assert_unchanged,
    layers_of,
    psoft,
    randomize,
    relative_error,
    snapshot,
    some_tokens,
    tiny_bert,
    tiny_llama,
    tiny_opt,
    transformers_takes_peft,
)
from isotune import HRAConfig, OFTConfig, PsoftConfig, add_adapter, get_peft_model, load_adapter
from isotune.methods import METHODS
from isotune.methods.config import IsotuneConfig
from quantisers import parameters, quantise


def config(method: str, **options: Any) -> IsotuneConfig:
    return METHODS[method](**{"target_modules": "all-linear", **OPTIONS_FOR_TINY[method], **options})


def with_all_methods(model: nn.Module, **options: Any) -> PeftModel:
    """A model with an adapter of every method, each called by its method, trained-looking."""
    adapted = get_peft_model(model, config("psoft", **options), "psoft")
    for method in METHODS:
        if method != "psoft":
            add_adapter(adapted, method, config(method, **options))
    for seed, method in enumerate(METHODS):
        randomize(adapted, method, std=0.2, seed=seed)
    return adapted.eval()


def alone(model: PeftModel, name: str, call: Any) -> Any:
    """What `call(model)` gives with one adapter, or with none for "__base__"."""
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    return call(model)


NAMES = ["oft", "__base__", *METHODS, "psoft"]


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
@pytest.mark.slow
def test_every_sample_of_a_batch_with_all_methods_is_as_if_alone(build: Any) -> None:
    model = with_all_methods(build())
    tokens = some_tokens(len(NAMES), 6)
    with torch.no_grad():
        for row, name, found in zip(tokens, NAMES, model(input_ids=tokens, adapter_names=NAMES).logits, strict=True):
            expected = alone(model, name, lambda m, row=row: m(input_ids=row[None]).logits)
            assert relative_error(found[None], expected) < 2e-6, name


def assert_same_text(together: Tensor, singles: Sequence[Tensor], copies: int = 1) -> None:
    """Rows of one generation are those of the single ones, which may have ended sooner."""
    for found, one in zip(together.split(copies), singles, strict=True):
        assert torch.equal(found[:, : one.shape[1]], one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "copies"),
    [({}, 1), ({"num_beams": 3}, 1), ({"num_beams": 4, "num_return_sequences": 2}, 2)],
    ids=["greedy", "beams", "several-answers"],
)
@pytest.mark.parametrize("place", ["arguments", "generation_config", "model"])
def test_generation_with_a_name_a_sample(options: dict[str, Any], copies: int, place: str) -> None:
    model = with_all_methods(tiny_llama(eos_token_id=None))
    tokens, options = some_tokens(len(NAMES), 6), {"max_new_tokens": 5, "do_sample": False, **options}
    singles = [
        alone(model, name, lambda m, row=row: m.generate(input_ids=row[None], **options))
        for row, name in zip(tokens, NAMES, strict=True)
    ]
    if place == "arguments":
        given = options
    else:
        from transformers import GenerationConfig

        given = {"generation_config": GenerationConfig(**options)} if place == "generation_config" else {}
        if place == "model":
            model.get_base_model().generation_config.update(**options)
    assert_same_text(model.generate(input_ids=tokens, adapter_names=NAMES, **given), singles, copies)


def test_beams_of_an_encoder_and_a_decoder() -> None:
    """The encoder sees each sample once, the decoder once a beam."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(3)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
                 eos_token_id=None)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3)
    model = get_peft_model(base, config("psoft", target_modules=["q", "v"]), "psoft")
    add_adapter(model, "oft", config("oft", target_modules=["q", "v", "wo"]))
    for name in ("psoft", "oft"):
        randomize(model.eval(), name, std=0.5)
    tokens, names = some_tokens(3, 6) % 60, ["oft", "__base__", "psoft"]
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    singles = [
        alone(model, name, lambda m, row=row: m.generate(input_ids=row[None], **options))
        for row, name in zip(tokens, names, strict=True)
    ]
    assert len({tuple(one[0].tolist()) for one in singles}) > 1
    assert_same_text(model.generate(input_ids=tokens, adapter_names=names, **options), singles)


@pytest.mark.parametrize("name", parameters())
def test_every_sample_of_a_batch_on_a_quantised_base_is_as_if_alone(name: str) -> None:
    model = get_peft_model(
        quantise(OneLayer(nn.Linear(96, 64)), name), config("psoft", target_modules=["layer"]), "psoft"
    )
    for method in ("oft", "hra"):
        add_adapter(model, method, config(method, target_modules=["layer"]))
    for seed, method in enumerate(("psoft", "oft", "hra")):
        randomize(model.eval(), method, std=0.2, seed=seed)
    x, names = torch.randn(5, 3, 96), ["hra", "__base__", "psoft", "oft", "psoft"]
    with torch.no_grad():
        for row, one, found in zip(x, names, model(x, adapter_names=names), strict=True):
            assert relative_error(found[None], alone(model, one, lambda m, row=row: m(row[None]))) < 2e-6, one


def test_a_batch_of_another_size_is_refused_and_leaves_nothing_behind() -> None:
    model = with_all_methods(tiny_llama())
    tokens = some_tokens(4, 5)
    expected = model(input_ids=tokens).logits
    for call in (
        lambda: model(input_ids=tokens, adapter_names=["psoft", "oft"]),
        lambda: model.generate(input_ids=tokens, num_beams=3, adapter_names=["psoft", "oft"]),
    ):
        with pytest.raises(ValueError, match="adapter_names has 2 entries for a batch of"):
            call()
    with pytest.raises(ValueError, match="'ofd', 'x'"):
        model.generate(input_ids=tokens, adapter_names=["psoft", "ofd", "__base__", "x"])
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_a_layer_whose_input_has_other_rows_is_named_as_what_it_is() -> None:
    """As of positions, or of texts beside images: the batch itself has as many samples as there are names."""
    model = get_peft_model(Positions(), psoft(r=2, target_modules=["positions", "head"])).eval()
    with pytest.raises(
        ValueError, match=r"names 4 samples, and an adapted layer has an input of 5 rows, of which each"
    ):
        model(torch.randn(4, 5, 12), adapter_names=["default", "default", "__base__", "default"])


class Positions(nn.Module):
    """A layer of the samples, and one of their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Linear(3, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(x + self.positions(torch.ones(5, 3)))
        return found


@pytest.mark.parametrize("active", ["with", "without"])
def test_a_saved_head_goes_to_the_samples_of_its_adapter_whatever_is_active(active: str) -> None:
    model = get_peft_model(tiny_bert(), psoft(target_modules=["query"], modules_to_save=["classifier"]), "with")
    add_adapter(model, "without", config("oft", target_modules=["query", "value"]))
    randomize(model.eval(), "without", std=0.3)
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["with"].weight.add_(0.5)
    tokens, names = some_tokens(3), ["without", "with", "__base__"]
    with torch.no_grad():
        expected = [
            alone(model, name, lambda m, row=row: m(row[None]).logits) for row, name in zip(tokens, names, strict=True)
        ]
        model.set_adapter(active)
        torch.testing.assert_close(model(tokens, adapter_names=names).logits, torch.cat(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(tokens[1:2]).logits, alone(model, active, lambda m: m(tokens[1:2]).logits))


# -- different methods -------------------------------------------------------------------------------------------------


def step(model: PeftModel) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = some_tokens()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def logits_of(model: Any, name: str) -> Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=some_tokens()).logits
    return logits


def test_train_one_switch_save_both_and_reload_both(tmp_path: Path) -> None:
    """PSOFT and OFT share the query projection, and each has layers of its own."""
    model = get_peft_model(tiny_llama(), PsoftConfig(r=8, target_modules=["q_proj", "down_proj"]), "subspace")
    add_adapter(model, "rotation", OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"]))
    base = logits_of(model, "subspace")
    assert torch.equal(logits_of(model, "rotation"), base)
    step(model)
    rotation = logits_of(model, "rotation")
    assert relative_error(rotation, base) > 1e-4
    assert torch.equal(logits_of(model, "subspace"), base)  # training one leaves the other alone
    step(model)
    subspace = logits_of(model, "subspace")
    assert relative_error(subspace, base) > 1e-4
    assert torch.equal(logits_of(model, "rotation"), rotation)
    assert model.peft_type == model.peft_config["subspace"].peft_type
    status = model.get_model_status()
    assert status.peft_types == {"subspace": "ISOTUNE_PSOFT", "rotation": "ISOTUNE_OFT"}
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "rotation"), "rotation")
    load_adapter(again, tmp_path / "subspace", "subspace")
    assert torch.equal(logits_of(again, "rotation"), rotation)
    assert relative_error(logits_of(again, "subspace"), subspace) < 1e-6
    again.delete_adapter("rotation")
    assert relative_error(logits_of(again, "subspace"), subspace) < 1e-6


@transformers_takes_peft
def test_transformers_itself_holds_adapters_of_different_methods(tmp_path: Path) -> None:
    model = tiny_llama()
    model.add_adapter(PsoftConfig(r=8, target_modules=["q_proj"]), adapter_name="subspace")
    model.add_adapter(HRAConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="rotation")
    expected = {}
    for name in ("subspace", "rotation"):
        randomize(model, name)
        expected[name] = logits_of(model, name)
        model.save_pretrained(str(tmp_path / name))
    again = tiny_llama()
    for name in expected:
        again.load_adapter(str(tmp_path / name), adapter_name=name)
    for name, logits in expected.items():
        assert relative_error(logits_of(again, name), logits) < 1e-6


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    """PEFT would load the tensors alone, which with another seed mean something else."""
    get_peft_model(Chain(), PsoftConfig(r=2, basis_seed=1, target_modules=["layers.0"])).save_pretrained(tmp_path)
    model = get_peft_model(Chain(), PsoftConfig(r=2, target_modules=["layers.0"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="has an adapter 'default'"):
        load_adapter(model, tmp_path, "default")
    assert_unchanged(model, before)


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = adapt(tiny_opt(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="LoraConfig is not one of isotune's configurations"):
        add_adapter(model, "lora", LoraConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its own add_adapter"):
        add_adapter(tiny_opt(), "other", psoft())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not divide"):
        add_adapter(model, "other", OFTConfig(oft_block_size=7, target_modules=["v_proj"]))
    assert list(model.peft_config) == ["default"]
    assert len(layers_of(model)) == 2
    with pytest.raises(ValueError, match="not a folder"):
        load_adapter(model, tmp_path / "missing", "other")
