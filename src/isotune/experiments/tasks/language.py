"""Causal language models trained on answers to questions: by TRL, scored by generation, likelihood or loss."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from isotune.experiments import data, loop, models, processes
from isotune.experiments.encoded import Encoded
from isotune.experiments.recipe import Data, Recipe
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.task import Task
from isotune.files.base_model import quiet

IGNORED = -100


@dataclass(frozen=True)
class Question:
    """A prompt, the answer to be learnt, and what is needed to judge another one."""

    prompt: str
    completion: str
    answer: str
    choices: tuple[str, ...] = ()
    set: str | None = None
    """The test set that it belongs to, where there are several."""


class SftLoop(loop.Loop, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer in our loop."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a checkpoint is for going on, not for publishing."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, and on a CPU without the logits of what is not learnt, which TRL leaves out on GPUs alone.

        With a large vocabulary the logits of the questions cost more than all else in a step.
        """
        whole = return_outputs or self.aux_loss_enabled or self.accelerator.num_processes > 1
        if whole or not _takes_places(model, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return _answer_loss(model, inputs, num_items_in_batch)


def _takes_places(model: Any, inputs: Mapping[str, Any]) -> bool:
    return inputs["labels"].device.type == "cpu" and "logits_to_keep" in _arguments_of(model)


def _answer_loss(model: Any, inputs: Mapping[str, Any], count: Any = None) -> Tensor:
    """The mean loss of the learnt tokens, or their sum over `count`, with logits at no other place of the batch."""
    labels = inputs["labels"][:, 1:]
    learnt = labels != IGNORED
    places = learnt.any(0).nonzero()[:, 0]  # from which some row of the batch learns its next token
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**given, use_cache=False, logits_to_keep=places).logits
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, places].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    mean: Tensor = total / (learnt.sum() if count is None else count)
    return mean


class LanguageTask(Task):
    """Questions answered in words; see `Task`. What a right answer is, a subclass says."""

    peft_type = "CAUSAL_LM"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        rows, columns = data.read(recipe.data)
        found = {
            split: [self.question(row, columns, judged=split != "train") for row in found]
            for split, found in rows.items()
        }
        arranged = data.arrange(recipe.data, found, lambda question: question.prompt)
        self.splits = {split: arranged.get(split, []) for split in ("train", "validation", "test")}
        if recipe.score != "loss" and recipe.choose_by != "loss":
            for question in self.splits["validation"]:
                if not question.answer:
                    raise DataError(
                        f"a validation question has no answer to judge by ({question.prompt[-60:]!r}); "
                        "set choose_by=loss to choose by the loss"
                    )
        self.sizes = {split: len(questions) for split, questions in self.splits.items()}

    @abstractmethod
    def question(self, row: Row, columns: Data, judged: bool) -> Question:
        """A question from a row, one that is `judged` with an answer; raises DataError where the row lacks it."""

    @abstractmethod
    def right(self, question: Question, prediction: Any) -> bool:
        """Whether what a model has said is the answer."""

    def fingerprint(self) -> str:
        return data.fingerprint(
            *([(q.prompt, q.completion, q.answer, q.choices, q.set) for q in split] for split in self.splits.values())
        )

    def about(self) -> dict[str, Any]:
        return {"sets": dict(Counter(question.set for question in self.splits["test"] if question.set is not None))}

    def build(self) -> tuple[Any, list[str]]:
        return models.load_causal(self.recipe.model, self.recipe.dtype), []

    def training_batch(self) -> dict[str, Any]:
        rows = self.encoded.train
        collate = DataCollatorForLanguageModeling(self.tokenizer.pad_token_id)
        parts = self.recipe.train.batch_size // self.recipe.train.gradient_accumulation
        return dict(collate([rows[i] for i in range(min(parts, len(rows)))]))

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        if _takes_places(model, batch):
            return _answer_loss(model, batch)
        return super().loss(model, batch)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's, padding on the left as generation needs it."""
        tokenizer = models.tokenizer_for(self.recipe.model)
        if tokenizer.eos_token_id is None:
            raise models.ModelError(f"the tokeniser of {self.recipe.model} has no token for the end of a text")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        return tokenizer

    def encode(self) -> Encoded:
        """The training set for TRL, the rest as questions that are examined one way or another."""
        from datasets import Dataset

        train, validation = self._training_rows("train"), self._training_rows("validation")
        return Encoded(
            train=Dataset.from_list(train),
            validation=Dataset.from_list(validation) if validation else [],
            test=[],
            collate=None,
            metric="loss",
            lengths=[len(row["input_ids"]) for row in train],
            examine=self._examine,
            trainer=SftLoop,
            # The rows are tokenised already, and mixed precision is left to the dtype of the frozen weights.
            arguments=partial(SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, bf16=False),
            options={"processing_class": self.tokenizer},
        )

    def predict(self, model: Any) -> list[Any]:
        return self._answers(model, self.splits["test"], self.recipe.score)

    def score(self, predictions: Sequence[Any]) -> dict[str, float]:
        return self._scores(self.splits["test"], predictions)

    def _tokens(self, prompt: str, completion: str, end: bool) -> tuple[list[int], int]:
        """Both tokenised as one text, since a token may reach across, and how many tokens are the prompt's alone."""
        alone = self.tokenizer(prompt)["input_ids"]
        ids = list(self.tokenizer(prompt + completion)["input_ids"])
        if end and ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        return ids, _common([alone, ids])

    def _training_rows(self, split: str) -> list[dict[str, Any]]:
        length, rows = self.recipe.train.max_length, []
        for question in self.splits[split]:
            ids, prompt = self._tokens(question.prompt, question.completion, end=True)
            if prompt < min(length, len(ids)):
                labels = [IGNORED] * prompt + ids[prompt:]
                rows.append({"input_ids": ids[:length], "labels": labels[:length]})
        left_out = len(self.splits[split]) - len(rows)
        if left_out and not rows:
            raise DataError(f"no question of the {split} split fits into train.max_length={length} tokens; raise it")
        if left_out:
            said = f"{left_out} of the {split} split are left out: longer than train.max_length={length} tokens"
            print(said, flush=True)
        return rows

    def _examine(self, model: Any, split: str) -> tuple[list[Any], dict[str, float], list[Any]]:
        questions = self.splits[split]
        answers = [question.answer for question in questions]
        if split == "validation" and self.recipe.choose_by == "loss" and self.recipe.score != "loss":
            return [], {"loss": fmean(self._answers(model, questions, "loss"))}, answers
        predictions = self._answers(model, questions, self.recipe.score)
        return predictions, self._scores(questions, predictions), answers

    def _answers(self, model: Any, questions: Sequence[Question], score: str) -> list[Any]:
        """What a model says to each question: a text, one of the choices, or the loss of the right answer."""
        answers: dict[str, Callable[[Any, Sequence[Question]], list[Any]]]
        answers = {"generation": self._generated, "likelihood": self._likeliest, "loss": self._losses}
        with torch.no_grad(), quiet():
            return answers[score](model.eval(), questions)

    def _scores(self, questions: Sequence[Question], predictions: Sequence[Any]) -> dict[str, float]:
        """The mean over the test sets, and each by its name where there are several."""
        name = "loss" if self.recipe.score == "loss" else "accuracy"
        found: dict[str | None, list[float]] = {}
        for question, prediction in zip(questions, predictions, strict=True):
            value = prediction if name == "loss" else float(self.right(question, prediction))
            found.setdefault(question.set, []).append(value)
        means = {part: fmean(values) for part, values in found.items()}
        return {name: fmean(means.values()), **({str(p): m for p, m in means.items()} if len(means) > 1 else {})}

    def _generated(self, model: Any, questions: Sequence[Question]) -> list[str]:
        prompts = [list(self.tokenizer(question.prompt)["input_ids"]) for question in questions]
        found: list[Any] = [None] * len(questions)
        for indices, ids, mask in self._batches(prompts, model, "generating"):
            generated = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.recipe.max_new_tokens,
                do_sample=False,
                # Models carry settings for sampling, which greedy decoding has no use for and warns of.
                temperature=None,
                top_p=None,
                top_k=None,
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
            [self._tokens(question.prompt, self.said(choice), end=False)[0] for choice in question.choices]
            for question in questions
        ]
        # One token at least is left to each, also where one choice begins another.
        shared = [min(_common(ids), *(len(one) - 1 for one in ids)) for ids in candidates]
        found = [[0.0] * len(ids) for ids in candidates]
        # Where the choices differ in their last token alone, one pass over what they share answers all of them.
        short = [all(len(ids) == at + 1 for ids in group) for group, at in zip(candidates, shared, strict=True)]
        stems = [i for i, alike in enumerate(short) if alike]
        for indices, ids, mask in self._batches([candidates[i][0][: shared[i]] for i in stems], model, "answering"):
            logits = _last_logits(model, ids, mask, 1)[:, -1]
            for row, index in zip(logits, indices, strict=True):
                i = stems[index]
                found[i] = [float(row[ids[-1]]) for ids in candidates[i]]
        rest = [(i, c) for i, alike in enumerate(short) if not alike for c in range(len(candidates[i]))]
        sequences = [candidates[i][c] for i, c in rest]
        for index, value in self._log_likelihoods(model, sequences, [shared[i] for i, _ in rest], "answering"):
            i, c = rest[index]
            found[i][c] = value
        return [q.choices[max(range(len(v)), key=v.__getitem__)] for q, v in zip(questions, found, strict=True)]

    def said(self, choice: str) -> str:
        """A choice in the words in which it is answered."""
        return choice

    def _losses(self, model: Any, questions: Sequence[Question]) -> list[float]:
        """The mean negative log-likelihood of a token of the right answer, for each question."""
        tokens = [self._tokens(question.prompt, question.completion, end=True) for question in questions]
        length = self.recipe.train.max_length
        cut, prompts = [ids[: max(length, prompt + 1)] for ids, prompt in tokens], [prompt for _, prompt in tokens]
        found = [0.0] * len(questions)
        for index, value in self._log_likelihoods(model, cut, prompts, "measuring"):
            found[index] = -value / (len(cut[index]) - prompts[index])
        return found

    def _log_likelihoods(
        self, model: Any, sequences: Sequence[list[int]], given: Sequence[int], what: str
    ) -> Iterator[tuple[int, float]]:
        """For each sequence the log-probability of what comes after the first `given` tokens."""
        for indices, ids, mask in self._batches(sequences, model, what):
            counts = [len(sequences[i]) - given[i] for i in indices]
            logits = _last_logits(model, ids, mask, max(counts) + 1)
            for row, index, count in zip(range(len(indices)), indices, counts, strict=True):
                scores = logits[row, -count - 1 : -1].float().log_softmax(-1)
                yield index, float(scores.gather(-1, ids[row, -count:, None]).sum())

    def _batches(
        self, sequences: Sequence[list[int]], model: Any, what: str
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Batches of like length, padded on the left: their indices, ids (batch, tokens) and mask (batch, tokens)."""
        device = next(model.parameters()).device
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        size = self.recipe.train.eval_batch_size
        for start in tqdm(
            range(0, len(order), size),
            desc=what,
            unit="batch",
            leave=False,
            disable=not processes.is_main(),
            mininterval=1,
        ):
            indices = order[start : start + size]
            rows = {"input_ids": [sequences[i] for i in indices]}
            batch = self.tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt").to(device)
            yield indices, batch["input_ids"], batch["attention_mask"]


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all the sequences begin with."""
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def _last_logits(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Logits (batch, count, vocabulary) of the last positions, without computing the others where the model can."""
    count = min(count, ids.shape[1])
    takes = _arguments_of(model)
    options: dict[str, Any] = {}
    if "position_ids" in takes:  # a model that counts positions from the left would count the padding
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = count
    logits: Tensor = model(input_ids=ids, attention_mask=mask, **options).logits
    return logits[:, -count:]


def _arguments_of(model: Any) -> set[str]:
    """What the forward of a model, below PEFT's wrapper, takes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(base).forward).parameters)
