"""Questions with a few answers to choose from, in the JSON form of LLM-Adapters."""

from __future__ import annotations

import re
from typing import Any

from isotune.experiments import data
from isotune.experiments.recipe import Recipe, RecipeError
from isotune.experiments.sections import Data
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.language import LanguageTask, Question

_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")


_ASKED = re.compile(r"^Please [^:\n]*:\s*")


class MultipleChoice(LanguageTask):
    """One of the answers that the question itself lists; see `Task`.

    A row has `instruction`, which ends in "Answer format: answer1/answer2/…", `input` (mostly empty), `output`, what is
    trained on, and `answer`, one of the answers listed. Those of the training set need not list any.

    A prompt with {instruction} shows the whole instruction, and the name of the answer is learnt and judged. One with
    {question} shows the question alone, and what is learnt and judged are the words that stand behind that name.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._in_words = recipe.prompt is not None and "{question}" in recipe.prompt
        self.shown = "{question}" if self._in_words else "{instruction}"
        if recipe.prompt is not None and self._in_words == ("{instruction}" in recipe.prompt):
            raise RecipeError("the prompt of multiple-choice questions must contain {instruction} or {question}")
        super().__init__(recipe)

    def question(self, row: Row, columns: Data, judged: bool) -> Question:
        text = data.cell(row, columns.text[0])
        completion, answer = data.cell(row, "output"), data.cell(row, columns.label)
        listed = _FORMAT.search(text)
        choices = tuple(listed.group(1).split("/")) if listed else ()
        if (judged or self._in_words) and not choices:
            raise DataError(f"{row.where}: the column {columns.text[0]!r} does not end in 'Answer format: …/…'")
        if choices and answer not in choices:
            raise DataError(f"{row.where}: the answer {answer!r} is none of {', '.join(choices)}")
        if not completion.endswith(answer):
            raise DataError(f"{row.where}: the output {completion!r} does not end in the answer {answer!r}")
        further = str(row.values.get("input") or "")
        if self._in_words and listed:
            question, words = in_words(text[: listed.start()], choices)
            completion, answer, choices = f" {words[answer]}", words[answer], tuple(words.values())
            text = _ASKED.sub("", question)
        return Question(self.asked(text, further, judged), completion, answer, choices, row.set)

    def said(self, choice: str) -> str:
        return f" {choice}" if self._in_words else f"the correct answer is {choice}"

    def right(self, question: Question, prediction: Any) -> bool:
        if self.recipe.score == "likelihood":
            return bool(prediction == question.answer)
        found = first_named if self.recipe.generation.answer == "llm-adapters" else first_choice
        return found(str(prediction), question.choices) == question.answer


def in_words(text: str, choices: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """A question and the words of each choice, where the text lists them as "Answer1: …"; else the choices' names."""
    found = re.match(
        r"\s*".join([r"(.*?)", *(re.escape(choice.capitalize()) + r":(.*?)" for choice in choices)]) + r"\s*$",
        text,
        re.DOTALL,
    )
    if found is None:
        return text.strip(), {choice: choice for choice in choices}
    question, *words = (part.strip() for part in found.groups())
    return question, dict(zip(choices, words, strict=True))


def first_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The one of the choices that a text names first, in whichever case, or None."""
    found = re.search("|".join(map(re.escape, sorted(choices, key=len, reverse=True))), text, re.IGNORECASE)
    return next((choice for choice in choices if found and choice.lower() == found.group().lower()), None)


def first_named(text: str, choices: tuple[str, ...]) -> str | None:
    """What the script of LLM-Adapters finds: the first name as it is written, before another "### Response:".

    Any of answer1 to answer5 is one, also where the question does not offer it.
    """
    names = [f"answer{number}" for number in range(1, 6)] if "answer1" in choices else choices
    found = re.search("|".join(map(re.escape, names)), text.partition("### Response:")[0])
    return found and found[0]
