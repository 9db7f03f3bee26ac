"""Causal language models trained on answers to questions: by TRL, scored by generation, likelihood or loss."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean
from typing import Any

import torch

from isotune.experiments import data, models
from isotune.experiments.recipe import Recipe, RecipeError
from isotune.experiments.resampling import Answers
from isotune.experiments.sections import Data
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.causal import IGNORED, CausalTask, by_set, common, last_logits
from isotune.files.base_model import quiet


@dataclass(frozen=True)
class Question:
    """A prompt, the answer to be learnt, and what is needed to judge another one."""

    prompt: str
    completion: str
    answer: str
    choices: tuple[str, ...] = ()
    set: str | None = None
    """The test set that it belongs to, where there are several."""

    @property
    def content(self) -> tuple[Any, ...]:
        """All that it says, as JSON."""
        return astuple(self)


class LanguageTask(CausalTask):
    """Questions answered in words; see `Task`. What a right answer is, a subclass says."""

    shown: str
    """What stands for the question in a prompt."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        for key, needed in (
            ("prompt", (self.shown,)),
            ("test_prompt", (self.shown,)),
            ("prompt_with_input", (self.shown, "{input}")),
        ):
            given = getattr(recipe, key)
            for one in needed:
                if given is not None and one not in given:
                    raise RecipeError(f"the {key} of the task {recipe.task} must contain {one}")
        rows, columns = data.read(recipe.data)
        found = {
            split: [self.question(row, columns, judged=split != "train") for row in found]
            for split, found in rows.items()
        }
        self.arrange(found, lambda question: question.prompt)
        if recipe.score != "loss" and recipe.choose_by != "loss":
            for question in self.splits["validation"]:
                if not question.answer:
                    raise DataError(
                        f"a validation question has no answer to judge by ({question.prompt[-60:]!r}); "
                        "set choose_by=loss to choose by the loss"
                    )

    @abstractmethod
    def question(self, row: Row, columns: Data, judged: bool) -> Question:
        """A question from a row, one that is `judged` with an answer; raises DataError where the row lacks it."""

    @abstractmethod
    def right(self, question: Question, prediction: Any) -> bool:
        """Whether what a model has said is the answer."""

    def asked(self, text: str, further: str, judged: bool) -> str:
        """The prompt of a question, with the text that comes with it in its own place, or else below the question."""
        prompt = (self.recipe.test_prompt if judged else None) or self.recipe.prompt or f"{self.shown}\n"
        if further and self.recipe.prompt_with_input is None:
            text, further = f"{text}\n\n{further}", ""
        elif further:
            prompt = str(self.recipe.prompt_with_input)
        parts = {self.shown: text, **({"{input}": further} if further else {})}
        return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], prompt)

    @property
    def generates(self) -> bool:  # type: ignore[override]
        """Whether answers are written token by token."""
        return self.recipe.score == "generation"

    def training_rows(self, split: str) -> list[dict[str, Any]]:
        texts = []
        for question in self.splits[split]:
            ids, given = self._given(question)
            texts.append((ids, [IGNORED] * given + ids[given:]))
        return list(self.fitting(split, texts, whole=False).values())

    def _given(self, question: Question) -> tuple[list[int], int]:
        """The tokens of a question and its answer, and how many of them, from the first, are not learnt."""
        ids, given = self.tokens(question.prompt, question.completion, end=True)
        if self.recipe.learn == "after-prompt":
            given = min(len(self.tokenizer(question.prompt)["input_ids"]), len(ids))
        return ids, 0 if self.recipe.learn == "text" else given

    def examine(self, model: Any, split: str) -> tuple[list[Any], dict[str, float]]:
        if split == "validation" and self.recipe.choose_by == "loss" and self.recipe.score != "loss":
            return [], {"loss": fmean(self._answers(model, split, "loss"))}
        return super().examine(model, split)

    def answered(self, model: Any, split: str) -> list[Any]:
        return self._answers(model, split, self.recipe.score)

    def answers(self, predictions: Sequence[Any]) -> Answers | None:
        if self.recipe.score == "loss":
            return None
        pairs = zip(self.splits["test"], predictions, strict=True)
        return Answers.of([self.right(question, prediction) for question, prediction in pairs], [1] * len(predictions))

    def _answers(self, model: Any, split: str, score: str) -> list[Any]:
        """What a model says to each question: a text, one of the choices, or the loss of the right answer."""
        answers: dict[str, Callable[[Any, Sequence[Question]], list[Any]]]
        answers = {"generation": self._generated, "likelihood": self._likeliest, "loss": self._losses}
        with torch.no_grad(), quiet():
            return answers[score](model.eval(), self.splits[split])

    def scores(self, split: str, answered: Sequence[Any]) -> dict[str, float]:
        """The mean over the test sets, and each by its name where there are several."""
        questions = self.splits[split]
        name = "loss" if self.recipe.score == "loss" else "accuracy"
        values = [
            prediction if name == "loss" else float(self.right(question, prediction))
            for question, prediction in zip(questions, answered, strict=True)
        ]
        return by_set(name, [question.set for question in questions], values)

    def _generated(self, model: Any, questions: Sequence[Question]) -> list[str]:
        prompts = [list(self.tokenizer(question.prompt)["input_ids"]) for question in questions]
        found: list[Any] = [None] * len(questions)
        how = self.recipe.generation
        if how.dtype is not None:
            model = models.merged_copy(model, how.dtype)
        for indices, ids, mask in self.batches(prompts, model, "generating"):
            generated = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.recipe.max_new_tokens,
                do_sample=False,
                num_beams=how.num_beams,
                # Models carry settings for sampling, which this has no use for and warns of.
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            texts = self.tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                found[index] = text.strip()
        return found

    def _likeliest(self, model: Any, questions: Sequence[Question]) -> list[str]:
        """The choice whose text has the greatest probability as the answer."""
        candidates = [
            [self.tokens(question.prompt, self.said(choice), end=False)[0] for choice in question.choices]
            for question in questions
        ]
        # One token at least is left to each, also where one choice begins another.
        shared = [min(common(ids), *(len(one) - 1 for one in ids)) for ids in candidates]
        found = [[0.0] * len(ids) for ids in candidates]
        # Where the choices differ in their last token alone, one pass over what they share answers all of them.
        short = [all(len(ids) == at + 1 for ids in group) for group, at in zip(candidates, shared, strict=True)]
        stems = [i for i, alike in enumerate(short) if alike]
        for indices, ids, mask in self.batches([candidates[i][0][: shared[i]] for i in stems], model, "answering"):
            logits = last_logits(model, ids, mask, 1)[:, -1]
            for row, index in zip(logits, indices, strict=True):
                i = stems[index]
                found[i] = [float(row[ids[-1]]) for ids in candidates[i]]
        rest = [(i, c) for i, alike in enumerate(short) if not alike for c in range(len(candidates[i]))]
        sequences = [candidates[i][c] for i, c in rest]
        for index, value in self.log_likelihoods(model, sequences, [shared[i] for i, _ in rest], "answering"):
            i, c = rest[index]
            found[i][c] = float(value.sum())
        return [q.choices[max(range(len(v)), key=v.__getitem__)] for q, v in zip(questions, found, strict=True)]

    def said(self, choice: str) -> str:
        """A choice in the words in which it is answered."""
        return choice

    def _losses(self, model: Any, questions: Sequence[Question]) -> list[float]:
        """The mean negative log-likelihood of a token that is learnt, of the right answer, for each question."""
        tokens = [self._given(question) for question in questions]
        length = self.recipe.train.max_length
        cut, prompts = [ids[: max(length, prompt + 1)] for ids, prompt in tokens], [prompt for _, prompt in tokens]
        found = [0.0] * len(questions)
        for index, value in self.log_likelihoods(model, cut, prompts, "measuring"):
            found[index] = -float(value.mean())
        return found
