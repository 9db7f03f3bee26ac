"""The guides' Python runs as it stands, on tiny models in folders named like those on the Hub."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import chat_tokenizer, conversations, judged, preferences
from helpers import make_tokenizer, tiny_bert, tiny_llama, tiny_unet

GUIDES = Path(__file__).parents[1] / "docs" / "guides"


def run(guide: str) -> dict[str, Any]:
    """All Python of a page from top to bottom, in one namespace."""
    text = (GUIDES / f"{guide}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, f"{guide}.md", "exec"), names)
    return names


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where a folder of a repository's name is taken before the Hub."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store(hub: Path, name: str, rows: Any) -> None:
    (hub / name).mkdir(parents=True)
    rows.to_json(str(hub / name / "train.jsonl"))


def store_language_model(hub: Path) -> None:
    tiny_llama(pad_token_id=0).save_pretrained(hub / "Qwen/Qwen3-0.6B")
    chat_tokenizer().save_pretrained(hub / "Qwen/Qwen3-0.6B")


@pytest.mark.slow
def test_trl(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    for name in ("SFTConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "RewardConfig"):
        # TRL's default of bfloat16 is refused without a GPU.
        here = functools.partial(getattr(trl, name), use_cpu=True, bf16=False, report_to=[])
        monkeypatch.setattr(trl, name, here)
    store_language_model(hub)
    store(hub, "trl-lib/Capybara", conversations())
    store(hub, "trl-lib/ultrafeedback_binarized", preferences())
    store(hub, "trl-lib/kto-mix-14k", judged())
    store(hub, "trl-lib/ultrafeedback-prompt", preferences().remove_columns(["chosen", "rejected"]))
    names = run("trl")
    assert {p.dtype for p in names["trainer"].model.parameters() if p.requires_grad} == {torch.float32}
    assert {folder.name for folder in (hub / "runs").iterdir()} >= {"chat", "dpo", "chat-dpo"}
    assert (hub / "runs/chat-dpo/ref/adapter_model.safetensors").is_file()


def test_embeddings(hub: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset

    name = "sentence-transformers/all-MiniLM-L6-v2"
    tiny_bert().bert.save_pretrained(hub / name)
    make_tokenizer().save_pretrained(hub / name)
    rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 1} w{i + 2}"} for i in range(8)]
    store(hub, "sentence-transformers/all-nli", Dataset.from_list(rows))
    card = "---\nconfigs:\n- config_name: pair\n  data_files: train.jsonl\n---\n"
    (hub / "sentence-transformers/all-nli/README.md").write_text(card)
    assert run("embeddings")["vectors"].shape == (2, 64)


def test_lightning(hub: Path) -> None:
    pytest.importorskip("lightning")
    store_language_model(hub)
    run("lightning")
    assert (hub / "runs/lightning/adapter_model.safetensors").is_file()


def test_diffusion(hub: Path) -> None:
    pytest.importorskip("diffusers")
    tiny_unet().save_pretrained(hub / "stable-diffusion-v1-5/stable-diffusion-v1-5/unet")
    assert run("diffusion")["half"].shape == (2, 4, 8, 8)


def test_vision(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="timm needs torchvision", exc_type=(ImportError, RuntimeError))
    timm = pytest.importorskip("timm")
    create: Callable[..., Any] = timm.create_model

    def tiny(name: str, pretrained: bool, **options: Any) -> Any:
        assert timm.is_model(name)
        torch.manual_seed(0)
        return create("test_vit", pretrained=False, img_size=224, **options)

    monkeypatch.setattr(timm, "create_model", tiny)
    assert run("vision")["plain"].num_classes == 10
