"""A tiny random BERT and a tiny task on disk, so that whole experiments take about a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

WORDS = [
    "good",
    "fine",
    "great",
    "nice",
    "bad",
    "poor",
    "awful",
    "sad",
    "the",
    "a",
    "film",
    "book",
    "was",
    "is",
    "very",
    "quite",
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers-like folder: two layers, hidden 32, with a tokeniser of 21 words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    (folder / "modules.json").write_text("[]")
    return folder


@pytest.fixture(scope="session")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeBERTa-v2 without a head, as the published one, two layers of width 32."""
    import torch
    from transformers import DebertaV2Config, DebertaV2Model

    from helpers import VOCABULARY, make_tokenizer

    folder = tmp_path_factory.mktemp("deberta")
    torch.manual_seed(0)
    DebertaV2Model(
        DebertaV2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            pooler_hidden_size=32,
        )
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT without a head, as the published one, two layers of width 32 on images of 32 × 32."""
    import torch
    import transformers
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
    )
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    try:
        transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError:
        pytest.skip("the image processors of this transformers need torchvision")
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a tokenizer of words that has a chat template."""
    from chats import chat_tokenizer
    from helpers import tiny_llama

    folder = tmp_path_factory.mktemp("chat")
    tiny_llama(pad_token_id=0).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three jsonl files: is the text about something good (1) or bad (0)?"""
    folder = tmp_path_factory.mktemp("data")
    random_ = random.Random(0)
    for split, count in {"train": 64, "validation": 24, "test": 24}.items():
        lines = []
        for number in range(count):
            label = number % 2
            words = random_.choices(WORDS[8:], k=random_.randint(1, 6))
            words.insert(random_.randrange(len(words)), random_.choice(WORDS[:4] if label else WORDS[4:8]))
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def tiny(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of two epochs, 16 steps, as a plain mapping for the test to change."""
    return {
        "model": str(tiny_model),
        "data": {
            "path": str(tiny_data),
            "files": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        },
        "method": {"name": "psoft", "r": 4},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.02, "lr_head": 0.01, "max_length": 16},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def language_adapter(tmp_path: Path) -> Path:
    """An adapter that has learnt something, beside its base model."""
    import torch
    from transformers import AutoModelForCausalLM

    from helpers import make_tokenizer, tiny_llama
    from isotune import PsoftConfig, get_peft_model

    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    config = PsoftConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"
