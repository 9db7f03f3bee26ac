"""sentence-transformers: an adapter added by the model's own method, trained by its trainer, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import OPTIONS_FOR_TINY, layers_of, make_tokenizer, relative_error, tiny_bert
from isotune.methods import METHODS

sentence_transformers = pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


def saved_encoder(folder: Path) -> Path:
    """A folder of a BERT of width 64, whose states are averaged."""
    tiny_bert().bert.save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    return folder / "bert"


def encoded(model: Any) -> torch.Tensor:
    return torch.as_tensor(model.encode(TEXTS, convert_to_numpy=True))


@pytest.mark.parametrize("method", ["psoft", "oft", "hra"])
def test_train_save_load_and_encode(method: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    folder = saved_encoder(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    base = encoded(model)
    model.add_adapter(METHODS[method](target_modules=["query", "value"], **OPTIONS_FOR_TINY[method]))
    assert relative_error(encoded(model), base) < 1e-6
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = [{"sentence1": f"w{i} w{i + 1}", "sentence2": f"w{i + 1} w{i + 2}"} for i in range(8)]
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=0.02,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    trained = encoded(model)
    assert relative_error(trained, base) > 1e-3
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    model.save_pretrained(str(tmp_path / "saved"))
    assert list((tmp_path / "saved").rglob("adapter_model.safetensors"))
    assert not list((tmp_path / "saved").rglob("model.safetensors"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert layers_of(again)
    assert relative_error(encoded(again), trained) < 1e-5
    model.disable_adapters()
    assert torch.equal(encoded(model), base)
