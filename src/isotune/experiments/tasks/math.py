"""Word problems whose answer is a number (GSM8K) or an expression (MATH)."""

from __future__ import annotations

import importlib.util
import re
import threading
from decimal import Decimal, InvalidOperation
from typing import Any

from isotune.experiments import data
from isotune.experiments.recipe import Recipe, RecipeError
from isotune.experiments.sections import Data
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.language import LanguageTask, Question
from isotune.versions import install

_NUMBER = re.compile(r"[-+]?\$?\s?(\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOUNCED = re.compile(r"(?:####|(?:the\s+)?answer\s+is\s*:?)", re.IGNORECASE)


class MathWords(LanguageTask):
    """A worked solution, right if its final answer is; see `Task`.

    A row has `question` and `answer`, the worked solution. Where it is judged the solution ends in "#### number", and
    the final numbers are compared, or holds \\boxed{…}, and the expressions are, by the library math-verify. With a
    `prompt_with_input` the question is its first line, and the lines below, where there are any, are its input.
    """

    shown = "{question}"

    def __init__(self, recipe: Recipe) -> None:
        if recipe.score == "likelihood":
            raise RecipeError("the task math has no answers to choose from: score is generation or loss")
        super().__init__(recipe)

    def question(self, row: Row, columns: Data, judged: bool) -> Question:
        asked, solution = data.cell(row, columns.text[0]), data.cell(row, columns.label)
        lines = asked.split("\n", 1) if self.recipe.prompt_with_input is not None else [asked]
        prompt = self.asked(lines[0], "".join(lines[1:]), judged)
        answer = self._final(row, solution)
        if judged and not answer and self.recipe.score != "loss":
            raise DataError(
                f"{row.where}: the solution has no final answer: expected '#### number' or \\boxed{{expression}}"
            )
        return Question(prompt, solution, answer, (), row.set)

    def _final(self, row: Row, solution: str) -> str:
        """What a prediction is compared with: a number, or a solution with a boxed expression; else empty."""
        if "####" in solution:
            if final_number(solution) is None:
                raise DataError(f"{row.where}: there is no number after ####")
            return str(final_number(solution))
        if "\\boxed" in solution:
            if self.recipe.score != "loss" and importlib.util.find_spec("math_verify") is None:
                raise RecipeError(f"judging expressions needs the package math-verify: {install('math')}")
            return solution
        return str(final_number(solution)) if _ANNOUNCED.search(solution) and final_number(solution) is not None else ""

    def right(self, question: Question, prediction: Any) -> bool:
        if "\\boxed" in question.answer:
            return same_expression(question.answer, str(prediction))
        return final_number(str(prediction)) == Decimal(question.answer)


def final_number(text: str) -> Decimal | None:
    """The number after the last "####" or "answer is", else the last number of a text; None where there is none."""
    announced = [match.end() for match in _ANNOUNCED.finditer(text)]
    after = _NUMBER.search(text, announced[-1]) if announced else None
    found = [after] if after else list(_NUMBER.finditer(text))
    if not found:
        return None
    match = found[-1]
    sign = "-" if match.group().startswith("-") else ""
    try:
        return Decimal(sign + match.group(1).replace(",", ""))
    except InvalidOperation:
        return None


def same_expression(solution: str, prediction: str) -> bool:
    """Whether the final expressions of a solution with \\boxed{…} and of a prediction are mathematically equal."""
    from math_verify import parse, verify

    announced = [match.end() for match in _ANNOUNCED.finditer(prediction)]
    if "\\boxed" not in prediction and announced:
        final = prediction[announced[-1] :].strip().splitlines()[:1]
        prediction = f"${final[0].strip().rstrip('.').strip('$')}$" if final else ""
    # The library's limits of time are alarms, which only the main thread may set.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    gold = parse(solution, parsing_timeout=limit)
    return bool(verify(gold, parse(prediction, parsing_timeout=limit), timeout_seconds=limit))
