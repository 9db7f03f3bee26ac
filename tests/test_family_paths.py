"""What a user of the orthogonal family does: train, save, load elsewhere, merge, generate, by PEFT and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import (
    OPTIONS_FOR_TINY,
    layers_of,
    randomize,
    relative_error,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    trainable,
    transformers_takes_peft,
)
from isotune import get_peft_model
from isotune.methods import METHODS
from scripts import printed_by

FAMILY = [name for name in OPTIONS_FOR_TINY if name != "psoft"]
every_method = pytest.mark.parametrize("method", FAMILY)
TOKENS = torch.arange(4, 24).reshape(2, 10)


def config(method: str, **options: object) -> object:
    return METHODS[method](target_modules="all-linear", **{**OPTIONS_FOR_TINY[method], **options})


def trained(method: str, base: nn.Module) -> PeftModel:
    """Five steps on one batch, in which the loss must fall."""
    model = get_peft_model(base, config(method)).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3)
    losses = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.02
    return model.eval()


LOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from helpers import tiny_llama
torch.set_num_threads(2)
for folder in map(Path, sys.argv[1:]):
    model = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(4, 24).reshape(2, 10)).logits, folder / "logits.pt")
"""


@pytest.mark.slow
def test_train_save_and_load_in_another_process(tmp_path: Path) -> None:
    expected = {}
    for method in FAMILY:
        folder = tmp_path / method
        model = trained(method, tiny_llama())
        with torch.no_grad():
            expected[folder] = model(input_ids=TOKENS).logits
        model.save_pretrained(str(folder))
        again = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
        with torch.no_grad():
            assert torch.equal(again(input_ids=TOKENS).logits, expected[folder]), method
    printed_by(LOAD, *map(str, expected), folder=tmp_path)
    for folder, logits in expected.items():
        found = torch.load(folder / "logits.pt", weights_only=True)
        assert relative_error(found, logits) < 1e-6, folder.name


@every_method
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2])
def test_merge_and_unload_is_a_plain_model(method: str, build: object) -> None:
    model = get_peft_model(build(), config(method)).eval()  # type: ignore[operator]
    randomize(model, std=0.05)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        plain = model.merge_and_unload()
        assert not layers_of(plain)
        assert relative_error(plain(input_ids=TOKENS).logits, expected) < 1e-4


@every_method
def test_mixed_batches_and_generation(method: str) -> None:
    model = get_peft_model(tiny_llama(), config(method)).eval()
    model.add_adapter("other", config(method))
    randomize(model, std=0.2)
    randomize(model, std=0.2, adapter="other")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = []
    for row, name in zip(TOKENS, ("default", "other"), strict=True):
        model.set_adapter(name)
        alone.append(model.generate(input_ids=row[None], **options))
    model.set_adapter("default")
    together = model.generate(input_ids=TOKENS, adapter_names=["default", "other"], **options)
    assert torch.equal(together, torch.cat(alone))


@every_method
@transformers_takes_peft
def test_transformers_adds_and_loads_it(method: str, tmp_path: Path) -> None:
    model = tiny_opt()
    model.add_adapter(config(method), adapter_name="mine")
    randomize(model, std=0.2, adapter="mine")
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    model.save_pretrained(str(tmp_path))
    again = tiny_opt()
    again.load_adapter(str(tmp_path), adapter_name="mine")
    with torch.no_grad():
        assert relative_error(again(input_ids=TOKENS).logits, expected) < 1e-6
        again.disable_adapters()
        assert torch.equal(again(input_ids=TOKENS).logits, tiny_opt()(input_ids=TOKENS).logits)
