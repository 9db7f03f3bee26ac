"""Questions with a few answers to choose from, in the JSON form of LLM-Adapters."""

from __future__ import annotations

import re
from typing import Any

from isotune.experiments import data
from isotune.experiments.recipe import Recipe, RecipeError
from isotune.experiments.tasks.language import LanguageTask, Question

_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")


class MultipleChoice(LanguageTask):
    """One of the answers that the question itself lists; see `Task`.

    A row has `instruction`, which ends in "Answer format: answer1/answer2/…", `input` (mostly empty), `output`, what is
    trained on, and `answer`, one of the answers listed. Those of the training set need not list any.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.prompt is not None and "{instruction}" not in recipe.prompt:
            raise RecipeError("the prompt of multiple-choice questions must contain {instruction}")
        super().__init__(recipe)

    def question(self, row: data.Row, columns: data.Columns, judged: bool) -> Question:
        instruction = data.cell(row, columns.text[0])
        if row.values.get("input"):
            instruction = f"{instruction}\n\n{row.values['input']}"
        completion, answer = data.cell(row, "output"), data.cell(row, columns.label)
        listed = _FORMAT.search(data.cell(row, columns.text[0]))
        choices = tuple(listed.group(1).split("/")) if listed else ()
        if judged and not choices:
            raise data.DataError(f"{row.where}: the column {columns.text[0]!r} does not end in 'Answer format: …/…'")
        if choices and answer not in choices:
            raise data.DataError(f"{row.where}: the answer {answer!r} is none of {', '.join(choices)}")
        if not completion.endswith(answer):
            raise data.DataError(f"{row.where}: the output {completion!r} does not end in the answer {answer!r}")
        prompt = (self.recipe.prompt or "{instruction}\n").replace("{instruction}", instruction)
        return Question(prompt, completion, answer, choices, row.set)

    def said(self, choice: str) -> str:
        return f"the correct answer is {choice}"

    def right(self, question: Question, prediction: Any) -> bool:
        if self.recipe.score == "likelihood":
            return bool(prediction == question.answer)
        return first_choice(str(prediction), question.choices) == question.answer


def first_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The one of the choices that a text names first, in whichever case, or None."""
    found = re.search("|".join(map(re.escape, sorted(choices, key=len, reverse=True))), text, re.IGNORECASE)
    return next((choice for choice in choices if found and choice.lower() == found.group().lower()), None)
