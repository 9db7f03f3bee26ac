"""What a model forgets, at the end of a training and on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import make_tokenizer, tiny_llama
from isotune import PsoftConfig, get_peft_model
from isotune.experiments import models
from isotune.experiments.forgetting import Forgetting, general_texts


def test_the_general_text_is_prose_and_always_the_same() -> None:
    texts = general_texts()
    assert len(texts) == len(set(texts)) == 64
    assert texts == general_texts()
    assert all(32 <= len(text.split()) <= 64 for text in texts)


def test_an_encoder_forgets_nothing_until_it_is_changed(tiny_model: Path) -> None:
    model, _ = models.load_classifier(str(tiny_model), "auto", ["a", "b"])
    forgetting = Forgetting(model, models.tokenizer_for(str(tiny_model)))
    adapted = get_peft_model(model, PsoftConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    unchanged = forgetting.after(adapted)
    assert unchanged is not None
    assert unchanged["change"] == pytest.approx(0.0, abs=1e-6)
    assert unchanged["unit"] == "cosine distance"
    rows = nn.functional.normalize(forgetting.before, dim=-1)
    alike = [float(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(i)]
    assert unchanged["apart"] == pytest.approx(1 - sum(alike) / len(alike), abs=1e-5)
    changes = []
    for scale in (0.1, 1.0):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "isotune" in name:
                    parameter.normal_().mul_(scale)
        found = forgetting.after(adapted)
        assert found is not None
        changes.append(found["change"])
    assert 1e-6 < changes[0] < changes[1] < 2


def test_what_the_base_knows_is_measured_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), make_tokenizer()
    first = Forgetting(model, tokenizer, tmp_path / "untrained").after(model)
    monkeypatch.setattr(Forgetting, "_look", None)
    again = Forgetting(model, tokenizer, tmp_path / "untrained")
    assert again.after(model, 0.0) == first
    monkeypatch.setattr("isotune.experiments.forgetting.general_texts", lambda: ["another text"])
    with pytest.raises(TypeError):
        Forgetting(model, tokenizer, tmp_path / "untrained")


def test_a_language_model_forgets_by_its_loss() -> None:
    model, tokenizer = tiny_llama(), make_tokenizer()
    forgetting = Forgetting(model, tokenizer)
    found = forgetting.after(model)
    assert found is not None
    assert found["measure"] == "next-token loss"
    assert found["change"] == 0.0
    losses: list[Any] = []
    for text in forgetting.texts:
        ids: Tensor = tokenizer(text, truncation=True, max_length=forgetting.max_length, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        losses += nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    assert found["before"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
