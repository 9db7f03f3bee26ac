"""Chats over the words of the tiny tokenizer, in the columns that TRL's trainers read."""

from __future__ import annotations

from typing import Any

from helpers import WORDS, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def chat_tokenizer() -> Any:
    """A tokenizer of words with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def words(start: int, count: int = 4) -> str:
    """A few words that differ from those of another start."""
    return " ".join(WORDS[(7 * start + 3 * i) % len(WORDS)] for i in range(count))


def said(role: str, start: int) -> list[dict[str, str]]:
    """One message."""
    return [{"role": role, "content": words(start)}]


def conversations(count: int = 8) -> Any:
    """For SFT."""
    from datasets import Dataset

    rows = [{"messages": said("user", i) + said("assistant", i + 20)} for i in range(count)]
    return Dataset.from_list(rows)


def preferences(count: int = 8) -> Any:
    """For DPO and reward models."""
    from datasets import Dataset

    rows = [
        {"prompt": said("user", i), "chosen": said("assistant", i + 20), "rejected": said("assistant", i + 40)}
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def judged(count: int = 8) -> Any:
    """For KTO."""
    from datasets import Dataset

    rows = [
        {"prompt": said("user", i), "completion": said("assistant", i + 20), "label": i % 2 == 0} for i in range(count)
    ]
    return Dataset.from_list(rows)
