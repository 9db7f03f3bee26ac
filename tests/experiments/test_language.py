"""`isotune chat`: what a language model and an adapter on it answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from chats import chat_tokenizer
from helpers import tiny_bert
from isotune import PeftModel
from isotune.experiments.language import Chat, language_model
from isotune_cli import app

runner = CliRunner()


def likeliest(model: torch.nn.Module, text: str, count: int) -> str:
    """The words that plain decoding adds to a text."""
    tokenizer = chat_tokenizer()
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_both_answer_in_conversations_of_their_own(language_adapter: Path) -> None:
    base = language_adapter.parent / "base"
    chat_tokenizer().save_pretrained(language_adapter)
    model, tokenizer, name = language_model(str(language_adapter))
    assert name == str(base)
    talk = Chat(model, tokenizer, new_tokens=5)
    first, second = talk.ask("w3 w4"), talk.ask("w5")
    assert first["base"] != first["adapter"]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(language_adapter)).eval()
    for side, alone in (("base", plain), ("adapter", adapted)):
        turns = [{"role": "user", "content": "w3 w4"}]
        for question, answer in ((None, first[side]), ("w5", second[side])):
            if question:
                turns += [{"role": "assistant", "content": first[side]}, {"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            assert likeliest(alone, text, 5) == answer


def test_the_command(language_adapter: Path) -> None:
    once = runner.invoke(app, ["chat", str(language_adapter.parent), "w3 w4", "--new-tokens", "4"])
    assert once.exit_code == 0, once.output
    assert [line.split()[0] for line in once.stdout.splitlines()] == ["base:", "adapter:"]
    asked = runner.invoke(app, ["chat", str(language_adapter), "--new-tokens", "4"], input="w3 w4\nw5\n")
    assert asked.exit_code == 0, asked.output
    assert asked.stdout.count("adapter:") == 2
    assert once.stdout.splitlines()[1].split()[1:] == asked.stdout.splitlines()[1].split()[1:]


def test_nothing_and_too_much_are_refused(language_adapter: Path) -> None:
    talk = Chat(*language_model(str(language_adapter))[:2], new_tokens=5)
    talk.model.config.max_position_embeddings = 7
    for question, said in (("", "no words"), ("w1 w2 w3 w4", "exceed the 7")):
        with pytest.raises(ValueError, match=said):
            talk.ask(question)
    assert talk.ask("w1").keys() == {"base", "adapter"}
    asked = runner.invoke(app, ["chat", str(language_adapter), "--new-tokens", "4"], input="\n  \nw5\n")
    assert asked.exit_code == 0, asked.output
    assert asked.stdout.count("adapter:") == 1


def test_what_is_no_language_model_is_refused(language_adapter: Path, tmp_path: Path) -> None:
    config = language_adapter / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "task_type": "SEQ_CLS"}))
    refused = runner.invoke(app, ["chat", str(language_adapter), "w3"])
    assert refused.exit_code == 2
    assert "is an adapter for SEQ_CLS" in refused.output
    config.write_text(json.dumps({**raw, "task_type": None}))
    tiny_bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="generates no text"):
        language_model(str(language_adapter), str(tmp_path / "bert"))
