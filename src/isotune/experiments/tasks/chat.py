"""Conversations, and prompts with their completions, of one's own: what the assistant says is learnt."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from isotune.experiments import data, processes
from isotune.experiments.recipe import Recipe
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.causal import IGNORED, CausalTask, by_set
from isotune.experiments.tasks.conversations import ChatTemplate, Dialogue, messages, said, tools
from isotune.files.base_model import quiet

LARGEST_EXPONENT = 700.0
"""Of a loss that is shown as a perplexity: what a float can hold."""


class DialogueTask(CausalTask):
    """What tasks of dialogues share; see `Task`. What a row says, a subclass reads."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        rows, _ = data.read(recipe.data)
        # Equal prompts, or equal dialogues, stay together where a test set is made of the training set.
        self.arrange(
            {split: [self.dialogue(row) for row in found] for split, found in rows.items()},
            lambda dialogue: json.dumps(dialogue.prompt or dialogue.completion, sort_keys=True),
        )

    @abstractmethod
    def dialogue(self, row: Row) -> Any:
        """What a row says; raises DataError where it lacks something."""

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the model."""
        return ChatTemplate(self.tokenizer, self.recipe.model)

    def tokens_of(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """The tokens of a dialogue, and which of them are learnt, one at least."""
        if isinstance(dialogue.prompt, str) and isinstance(dialogue.completion, str):
            ids, prompt = self.tokens(dialogue.prompt, dialogue.completion, end=True)
            return ids, [place >= max(prompt, 1) for place in range(len(ids))]
        ids, learnt = self.template.tokens(dialogue)
        learnt[:1] = [False]  # nothing stands before the first token from which it could be told
        if not any(learnt):
            raise DataError(f"{dialogue.where}: the chat template of {self.recipe.model} renders no answer to learn")
        return ids, learnt


class Answers(DialogueTask):
    """Dialogues scored by the loss of what is learnt: the mean over the tokens, and its exponential; see `Task`."""

    def training_rows(self, split: str) -> list[dict[str, Any]]:
        return list(self._rows[split].values())

    @cached_property
    def _rows(self) -> dict[str, dict[int, dict[str, Any]]]:
        """The rows of each split, by the place of their dialogues in it."""
        found = {}
        for split, dialogues in self.splits.items():
            texts = []
            for dialogue in processes.with_bar(dialogues, "tokenising", "example"):
                ids, learnt = self.tokens_of(dialogue)
                texts.append((ids, [one if own else IGNORED for one, own in zip(ids, learnt, strict=True)]))
            found[split] = self.fitting(split, texts, whole=True)
        return found

    def answers(self, predictions: Sequence[Any]) -> None:
        return None  # losses

    def answered(self, model: Any, split: str) -> list[float]:
        """The mean negative log-likelihood of a learnt token, for each dialogue."""
        rows = self.training_rows(split)
        first = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in rows]
        found = [0.0] * len(rows)
        with torch.no_grad(), quiet():
            sequences = [row["input_ids"] for row in rows]
            for index, scores in self.log_likelihoods(model.eval(), sequences, first, "measuring"):
                learnt = [label != IGNORED for label in rows[index]["labels"][first[index] :]]
                found[index] = -float(scores[torch.tensor(learnt, device=scores.device)].mean())
        return found

    def scores(self, split: str, answered: Sequence[float]) -> dict[str, float]:
        counts = [float(sum(label != IGNORED for label in row["labels"])) for row in self._rows[split].values()]
        sets = [self.splits[split][place].set for place in self._rows[split]]
        scores = by_set("loss", sets, answered, counts)
        return {**scores, "perplexity": math.exp(min(scores["loss"], LARGEST_EXPONENT))}


class Chat(Answers):
    """Conversations whose turns of the assistant are learnt; see `Task`.

    A row has `messages`, and may have `tools`.
    """

    def dialogue(self, row: Row) -> Dialogue:
        found = messages(row, "messages")
        if all(message["role"] != "assistant" for message in found):
            raise DataError(f"{row.where}: there is no message of the assistant in 'messages', so nothing to learn")
        return Dialogue([], found, tools(row), row.where, row.set)


class Completion(Answers):
    """Prompts whose completion is learnt; see `Task`.

    A row has `prompt` and `completion`, both texts or both messages, and may have `tools`.
    """

    def dialogue(self, row: Row) -> Dialogue:
        prompt, completion = said(row, "prompt"), said(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(f"{row.where}: of 'prompt' and 'completion' one is a text, the other messages")
        check_answer(completion, row, "completion")
        return Dialogue(prompt, completion, tools(row), row.where, row.set)


def check_answer(answer: str | list[dict[str, Any]], row: Row, column: str) -> None:
    """Check that messages which follow a prompt begin with one of the assistant; raises DataError."""
    if not isinstance(answer, str) and answer[0]["role"] != "assistant":
        raise DataError(
            f"{row.where}: the first message of {column!r} is the {answer[0]['role']}'s, not the assistant's"
        )
