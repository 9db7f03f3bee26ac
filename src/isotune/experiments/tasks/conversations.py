"""Conversations as people store them, checked, and as the tokens that a model's chat template makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from isotune.experiments.data import cell, given
from isotune.experiments.models import ModelError
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.causal import common
from isotune.experiments.text import first_line, from_json, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Dialogue:
    """A prompt and what is learnt to follow it: two texts, or messages, of which the assistant's are learnt.

    The prompt of a whole conversation is empty: all turns of the assistant are learnt.
    """

    prompt: str | list[Message]
    completion: str | list[Message]
    tools: list[Any] | None
    where: str
    set: str | None = None
    """The test set that it belongs to, where there are several."""

    @property
    def content(self) -> list[Any]:
        """All that it says, as JSON."""
        return [self.prompt, self.completion, self.tools, self.set]


def said(row: Row, column: str) -> str | list[Message]:
    """The text, or the messages, in a column.

    Raises:
        DataError: it holds neither; the message names the file, line, column and message.
    """
    value = given(row, column)
    return messages(row, column) if isinstance(value, list) else cell(row, column)


def messages(row: Row, column: str) -> list[Message]:
    """The messages in a column, each a role and what it says, as text; raises as `said`."""
    value = given(row, column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: the column {column!r} holds {shown(value)}, not a list of messages")
    return [
        _checked(message, f"{row.where}, message {number} of {column!r}") for number, message in enumerate(value, 1)
    ]


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f"{where}: expected an object with 'role' and 'content', not {shown(message)}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: the role {shown(role)} is none of {', '.join(ROLES)}")
    if role == "assistant" and message.get("tool_calls") and content in (None, ""):
        return dict(message)
    if isinstance(content, list) and content:
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) == len(content):
            content = "".join(texts)  # some templates would render the list itself, brackets and all
    if isinstance(content, str) and (content or role != "assistant"):
        return {**message, "content": content}
    raise DataError(f"{where}: the content of the {role}'s message is {shown(content)}, not text")


def tools(row: Row) -> list[Any] | None:
    """What the column "tools" says that the assistant may call: a list, also as JSON in a text; None without one."""
    value = row.values.get("tools")
    if isinstance(value, str) and value:
        try:
            value = from_json(value)
        except ValueError as error:
            raise DataError(f"{row.where}: the column 'tools' is not valid JSON: {error}") from error
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise DataError(f"{row.where}: the column 'tools' holds {shown(value)}, not a list of tools")
    return value


class ChatTemplate:
    """A model's chat template, and which tokens of what it renders are the assistant's.

    Where TRL has a template for training in place of the model's own, which renders the same and marks what the
    assistant says, that one is used.

    Args:
        tokenizer: the model's.
        model: its name, for errors.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, model: str) -> None:
        from trl import get_training_chat_template

        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokeniser of {model} has no chat template: take a model that was trained to chat, mostly called "
                "-Instruct or -it, or give prompts and completions as text with task=completion"
            )
        self.tokenizer, self.model = tokenizer, model
        try:
            self.template: Any = get_training_chat_template(tokenizer)
        except (ValueError, TemplateError):  # one that TRL does not know; its own is then looked into, below
            self.template = None
        own = self.template or tokenizer.get_chat_template()
        self.marked = _MARKED.search(own) is not None

    def tokens(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """The tokens of a dialogue's messages, and which of them are learnt: the assistant's that follow the prompt.

        Raises:
            DataError: the template refuses them, or does not let it be seen which tokens are the assistant's.
        """
        before, learnt = dialogue.prompt, dialogue.completion
        assert isinstance(before, list)  # texts need no template
        assert isinstance(learnt, list)
        whole = [*before, *learnt]
        text = self._text(whole, dialogue)
        ids = self._ids(text)
        mask = [False] * len(ids)
        for begin, end in (
            self._marked(whole, len(before), dialogue, text)
            if self.marked
            else (
                self._span(whole, place, dialogue, text)
                for place in range(len(before), len(whole))
                if whole[place]["role"] == "assistant"
            )
        ):
            first, last = (common([self._ids(text[:place]), ids]) for place in (begin, end))
            mask[first:last] = [True] * (last - first)
        return ids, mask

    def _marked(
        self, whole: Sequence[Message], prompt: int, dialogue: Dialogue, text: str
    ) -> Iterator[tuple[int, int]]:
        """Where in the text what the template marks begins and ends, but for what stands in the prompt."""
        # The mask that the tokenizer itself can return reaches to the end of the text where a mark ends in a character
        # that is no part of any token.
        rendered, marks = render_jinja_template(
            conversations=[list(whole)],
            tools=dialogue.tools,
            chat_template=self.template or self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if rendered[0] != text:
            raise DataError(f"{dialogue.where}: the chat template of {self.model} renders it in two ways")
        before = common([self._text(whole[:prompt], dialogue), text]) if prompt else 0
        yield from ((begin, end) for begin, end in marks[0] if begin >= before)

    def _span(self, whole: Sequence[Message], place: int, dialogue: Dialogue, text: str) -> tuple[int, int]:
        """Where in the text a message of the assistant begins and ends."""
        before = self._text(whole[:place], dialogue, answer=True)
        upto = self._text(whole[: place + 1], dialogue)
        if not upto.startswith(before) or not text.startswith(upto):
            raise DataError(
                f"{dialogue.where}: the chat template of {self.model} renders message {place + 1} otherwise when other "
                "messages follow, so that it cannot be told which tokens are the assistant's; give conversations of "
                "one turn, or a model whose template marks what the assistant says ({% generation %})"
            )
        return len(before), len(upto)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, part: Sequence[Message], dialogue: Dialogue, *, answer: bool = False) -> str:
        text: str = self._render(part, dialogue, tokenize=False, add_generation_prompt=answer)
        return text

    def _render(self, part: Sequence[Message], dialogue: Dialogue, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(part), tools=dialogue.tools, chat_template=self.template, **options
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            said = f"the chat template of {self.model} does not take these messages: {first_line(error)}"
            raise DataError(f"{dialogue.where}: {said}") from error
