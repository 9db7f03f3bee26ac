"""Pairs of answers of which one is preferred: by TRL's DPO, the reference being the base without the adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference

from isotune.experiments import loop, processes
from isotune.experiments.encoded import Encoded
from isotune.experiments.resampling import Answers
from isotune.experiments.run import Run
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.causal import by_set, common
from isotune.experiments.tasks.chat import DialogueTask, check_answer
from isotune.experiments.tasks.conversations import Dialogue, said, tools
from isotune.files.base_model import quiet


class DpoLoop(loop.Loop, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer in our loop, on rows that hold their tokens and what the reference makes of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ref_model = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a checkpoint is for going on, not for publishing."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Dialogue
    rejected: Dialogue

    @property
    def prompt(self) -> Any:
        """What both answer."""
        return self.chosen.prompt

    @property
    def set(self) -> str | None:
        """The test set that it belongs to, where there are several."""
        return self.chosen.set

    @property
    def content(self) -> list[Any]:
        """All that it says, as JSON."""
        return [*self.chosen.content, self.rejected.completion]


class Preference(DialogueTask):
    """Pairs of answers; scored by how many are told apart as they were judged, and by DPO's loss; see `Task`.

    A row has `chosen` and `rejected`, and `prompt` unless both begin with it; all texts, or all messages. What is
    predicted of a pair is its margin: by how much more likely than to the base model the chosen answer has become,
    less the same of the rejected one, times `preference.beta`. Source: Rafailov et al. (2023), equation 7.
    """

    sequences = 2

    def dialogue(self, row: Row) -> Pair:
        answers = {column: said(row, column) for column in ("chosen", "rejected")}
        if answers["chosen"] == answers["rejected"]:
            raise DataError(f"{row.where}: 'chosen' and 'rejected' are equal, so that there is nothing to prefer")
        if row.values.get("prompt") is not None:
            prompt = said(row, "prompt")
        else:
            parts = extract_prompt(answers)
            prompt, answers = parts["prompt"], {column: parts[column] for column in answers}
            if not prompt or not all(answers.values()):
                raise DataError(
                    f"{row.where}: there is no column 'prompt', and no beginning that 'chosen' and 'rejected' have in "
                    "common and after which each goes on"
                )
        if len({isinstance(one, str) for one in (prompt, *answers.values())}) > 1:
            raise DataError(f"{row.where}: of 'prompt', 'chosen' and 'rejected' some are texts, others messages")
        for column, answer in answers.items():
            check_answer(answer, row, column)
        called = tools(row)
        chosen, rejected = (Dialogue(prompt, answer, called, row.where, row.set) for answer in answers.values())
        return Pair(chosen, rejected)

    @cached_property
    def pairs(self) -> dict[str, dict[int, dict[str, list[int]]]]:
        """For each split the tokens of its pairs, as TRL names them, by the place of the pair in the split."""
        return {split: self._tokenised(split, pairs) for split, pairs in self.splits.items()}

    def _tokenised(self, split: str, pairs: Sequence[Pair]) -> dict[int, dict[str, list[int]]]:
        length = self.recipe.train.max_length
        found, cut, shortest = {}, 0, []
        for place, pair in enumerate(processes.with_bar(pairs, "tokenising", "pair")):
            (chosen, first), (rejected, second) = (self.tokens_of(one) for one in (pair.chosen, pair.rejected))
            begin = min(first.index(True), second.index(True), common([chosen, rejected]))
            shortest.append(max(len(chosen), len(rejected)))
            cut += shortest[-1] > length
            answers = {"chosen_ids": chosen[begin:length], "rejected_ids": rejected[begin:length]}
            if all(answers.values()) and answers["chosen_ids"] != answers["rejected_ids"]:
                found[place] = {"prompt_ids": chosen[:begin], **answers}
        self.say_cut(split, len(pairs), len(pairs) - len(found), cut, min(shortest, default=0))
        return found

    def training_rows(self, split: str) -> list[dict[str, Any]]:
        return list(self.pairs[split].values())

    def encode(self) -> Encoded:
        beta = self.recipe.preference.beta
        arguments = partial(DPOConfig, beta=beta, max_length=None, precompute_ref_log_probs=True)
        return replace(super().encode(), trainer=DpoLoop, arguments=arguments)

    def length(self, row: Mapping[str, Any]) -> int:
        return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])

    def collator(self) -> Any:
        return DataCollatorForPreference(self.tokenizer.pad_token_id)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """DPO's loss but for the reference, which is a constant: it keeps for backward what that keeps."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        likely = -functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten(), reduction="none"
        )
        answers = (likely.view(logits.shape[:2]) * batch["completion_mask"][:, 1:]).sum(1)
        chosen, rejected = answers.chunk(2)
        return -functional.logsigmoid(self.recipe.preference.beta * (chosen - rejected)).mean()

    def train(
        self, model: Any, run: Run, head: Sequence[str], callbacks: Sequence[TrainerCallback] = ()
    ) -> loop.Outcome:
        from datasets import Dataset

        for split in self.splits:
            self._reference(split, model, trained=False)

        def rows(split: str) -> Any:
            rows = zip(self.training_rows(split), self.references[split], strict=True)
            known = [{**row, "ref_chosen_logps": c, "ref_rejected_logps": r} for row, (c, r) in rows]
            return Dataset.from_list(known) if known else []

        encoded = replace(self.encoded, train=rows("train"), validation=rows("validation"))
        if hasattr(model, "disable_adapter"):
            # Without a model to refer to TRL adds a copy of the adapter for it, and never removes it. This one, which
            # shares all weights, is never asked: the rows hold what the base makes of them. TRL patches its forward.
            encoded = replace(encoded, options={**encoded.options, "ref_model": copy.copy(model.get_base_model())})
        return loop.train(model, encoded, run, head, callbacks)

    def answers(self, predictions: Sequence[Any]) -> Answers | None:
        return Answers.of([margin > 0 for margin in predictions], [1] * len(predictions))

    def score_untrained(self, model: Any) -> dict[str, float] | None:
        return None  # its margins are against itself, and zero

    def scores(self, split: str, answered: Sequence[float]) -> dict[str, float]:
        values = torch.tensor(answered, dtype=torch.float64)
        right = [float(margin > 0) for margin in answered]
        return {
            **by_set("accuracy", [self.splits[split][place].set for place in self.pairs[split]], right),
            "loss": float(functional.softplus(-values).mean()),
            "margin": fmean(answered),
        }

    def answered(self, model: Any, split: str) -> list[float]:
        reference = self._reference(split, model, trained=True)
        now = self._likelihoods(split, model)
        beta = self.recipe.preference.beta
        return [
            beta * ((chosen - chosen_before) - (rejected - rejected_before))
            for (chosen, rejected), (chosen_before, rejected_before) in zip(now, reference, strict=True)
        ]

    @cached_property
    def references(self) -> dict[str, list[tuple[float, float]]]:
        """The log-probabilities of both answers of each pair of a split by the base model, once they are known."""
        return {}

    def _reference(self, split: str, model: Any, *, trained: bool) -> list[tuple[float, float]]:
        if split not in self.references:
            with self._base(model, trained) as base:
                self.references[split] = self._likelihoods(split, base)
        return self.references[split]

    @contextmanager
    def _base(self, model: Any, trained: bool) -> Iterator[Any]:
        """The base model: `model` with its adapter switched off where that has left the base as it was."""
        configs = getattr(model, "peft_config", {})
        # LoRA's starts by name, such as "pissa", take from the base what they give to the adapter.
        changed = any(isinstance(getattr(config, "init_lora_weights", None), str) for config in configs.values())
        if configs and not changed:
            with model.disable_adapter():
                yield model
        elif trained or changed:
            yield self.build()[0].to(next(model.parameters()).device)
        else:
            yield model

    def _likelihoods(self, split: str, model: Any) -> list[tuple[float, float]]:
        """The log-probabilities of both answers of each pair."""
        rows = self.training_rows(split)
        sequences = [row["prompt_ids"] + row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]
        begins = [len(row["prompt_ids"]) for row in rows for _ in range(2)]
        found = [0.0] * len(sequences)
        training = model.training
        with torch.no_grad(), quiet():
            for index, scores in self.log_likelihoods(model.eval(), sequences, begins, "measuring"):
                found[index] = float(scores.sum())
        model.train(training)
        return list(zip(found[::2], found[1::2], strict=True))
