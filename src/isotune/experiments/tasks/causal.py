"""Causal language models trained on some tokens of their texts: by TRL, and how likely they find these tokens."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from isotune.experiments import data, loop, models, processes
from isotune.experiments.encoded import Encoded
from isotune.experiments.recipe import RecipeError
from isotune.experiments.sections import Padding
from isotune.experiments.tables import DataError
from isotune.experiments.tasks.task import Task

IGNORED = -100


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


class CausalTask(Task):
    """What tasks of causal language models share; see `Task`. What is learnt of which text, a subclass says."""

    peft_type = "CAUSAL_LM"
    splits: dict[str, list[Any]]
    """The examples of each split, none of which is left out; each has `content`, all that it says, and `set`."""

    def arrange(self, read: dict[str, list[Any]], key: Callable[[Any], Hashable]) -> None:
        """Take what was read; as `data.arrange`."""
        arranged = data.arrange(self.recipe.data, read, key)
        self.splits = {split: arranged.get(split, []) for split in ("train", "validation", "test")}
        self.sizes = {split: len(found) for split, found in self.splits.items()}

    def fingerprint(self) -> str:
        return data.fingerprint(*([example.content for example in split] for split in self.splits.values()))

    def about(self) -> dict[str, Any]:
        return {"sets": dict(Counter(one.set for one in self.splits["test"] if one.set is not None))}

    def build(self) -> tuple[Any, list[str]]:
        return models.load_causal(self.recipe.model, self.recipe.dtype), []

    def training_batch(self) -> dict[str, Any]:
        rows = self.encoded.train
        parts = self.recipe.train.batch_size // self.recipe.train.gradient_accumulation
        return dict(self.collator()([rows[i] for i in range(min(parts, len(rows)))]))

    def collator(self) -> Any:
        """TRL's, which makes a batch of rows, or transformers' where they are padded on the left."""
        multiple = self.recipe.padding.multiple_of
        if self.recipe.padding.side == "left":
            return DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=multiple)
        return DataCollatorForLanguageModeling(self.tokenizer.pad_token_id, pad_to_multiple_of=multiple)

    def length(self, row: Mapping[str, Any]) -> int:
        """How many tokens a row has."""
        return len(row["input_ids"])

    @property
    def longest(self) -> Sequence[int]:
        rows, lengths = self.encoded.train, self.encoded.lengths
        row = rows[max(range(len(lengths)), key=lengths.__getitem__)]
        parts = [row[name] for name in ("input_ids", "prompt_ids", "chosen_ids") if name in row]
        return [token for part in parts for token in part][: self.recipe.train.max_length]

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
        own = self.recipe.padding.token_id
        if own is not None and own >= len(tokenizer):
            raise RecipeError(f"padding.token_id={own} is no token of {self.recipe.model}, which has {len(tokenizer)}")
        if own is not None:
            tokenizer.pad_token_id = own
        elif tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        return tokenizer

    @abstractmethod
    def training_rows(self, split: str) -> list[dict[str, Any]]:
        """Rows of `input_ids` and, where a token is learnt, `labels`; raises DataError where none is left."""

    @abstractmethod
    def answered(self, model: Any, split: str) -> list[Any]:
        """What a model answers to the examples of a split."""

    @abstractmethod
    def scores(self, split: str, answered: Sequence[Any]) -> dict[str, float]:
        """The metrics of that."""

    def examine(self, model: Any, split: str) -> tuple[list[Any], dict[str, float]]:
        """What a model answers to the examples of a split, and the metrics of that."""
        answered = self.answered(model, split)
        return answered, self.scores(split, answered)

    def predict(self, model: Any) -> list[Any]:
        return self.answered(model, "test")

    def score(self, predictions: Sequence[Any]) -> dict[str, float]:
        return self.scores("test", predictions)

    def encode(self) -> Encoded:
        """The training set for TRL; the rest is examined one way or another."""
        from datasets import Dataset

        train = self.training_rows("train")
        validation = self.training_rows("validation") if self.sizes["validation"] else []
        return Encoded(
            train=Dataset.from_list(train),
            validation=Dataset.from_list(validation) if validation else [],
            test=[],
            collate=self.collator() if self.recipe.padding != Padding() else None,
            metric="loss",
            lengths=[self.length(row) for row in train],
            examine=self.examine,
            trainer=SftLoop,
            # The rows are tokenised already.
            arguments=partial(SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None),
            options={"processing_class": self.tokenizer},
        )

    def tokens(self, prompt: str, completion: str, end: bool) -> tuple[list[int], int]:
        """Both tokenised as one text, since a token may reach across, and how many tokens are the prompt's alone."""
        alone = self.tokenizer(prompt)["input_ids"]
        ids = list(self.tokenizer(prompt + completion)["input_ids"])
        if end and ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        return ids, common([alone, ids])

    def fitting(
        self, split: str, texts: Sequence[tuple[list[int], list[int]]], *, whole: bool
    ) -> dict[int, dict[str, Any]]:
        """Texts, each its tokens and its labels, cut at `train.max_length`, by their place; without a label left out.

        Says how many are cut and left out. Raises DataError where none is left, or where they are wanted `whole` and
        the labels of all are cut.
        """
        length = self.recipe.train.max_length
        kept = {
            place: {"input_ids": ids[:length], "labels": labels[:length]}
            for place, (ids, labels) in enumerate(texts)
            if any(label != IGNORED for label in labels[:length])
        }
        cut = sum(any(label != IGNORED for label in labels[length:]) for _, labels in texts) if whole else 0
        self.say_cut(split, len(texts), len(texts) - len(kept), cut, min((len(ids) for ids, _ in texts), default=0))
        return kept

    def say_cut(self, split: str, count: int, left_out: int, cut: int, shortest: int) -> None:
        """Say how many of a split do not fit into `train.max_length` tokens; raises DataError where none does.

        Args:
            split: its name.
            count: how many it has.
            left_out: of which nothing is left to learn.
            cut: of which something is cut off that would be learnt, those left out included.
            shortest: the tokens of the shortest one.
        """
        length = self.recipe.train.max_length
        if count and count in (left_out, cut):
            raise DataError(
                f"no example of the {split} split fits into train.max_length={length} tokens, the shortest has "
                f"{shortest}; raise it"
            )
        if left_out:
            processes.say(f"{left_out} of the {split} split are left out: longer than train.max_length={length} tokens")
        if cut > left_out:
            processes.say(f"{cut - left_out} of the {split} split are cut at train.max_length={length} tokens")

    def log_likelihoods(
        self, model: Any, sequences: Sequence[list[int]], given: Sequence[int], what: str
    ) -> Iterator[tuple[int, Tensor]]:
        """For each sequence the log-probabilities of the tokens after the first `given`, never of the first."""
        for indices, ids, mask in self.batches(sequences, model, what):
            counts = [len(sequences[i]) - max(given[i], 1) for i in indices]  # the first token follows nothing
            logits = last_logits(model, ids, mask, max(counts) + 1)
            for row, index, count in zip(range(len(indices)), indices, counts, strict=True):
                scores = logits[row, -count - 1 : -1].float().log_softmax(-1)
                yield index, scores.gather(-1, ids[row, -count:, None])[:, 0]

    def batches(
        self, sequences: Sequence[list[int]], model: Any, what: str
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Batches of like length, padded on the left: their indices, ids (batch, tokens) and mask (batch, tokens)."""
        device = next(model.parameters()).device
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        size = self.recipe.train.eval_batch_size
        for start in processes.with_bar(range(0, len(order), size), what, "batch"):
            indices = order[start : start + size]
            rows = {"input_ids": [sequences[i] for i in indices]}
            batch = self.tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt").to(device)
            yield indices, batch["input_ids"], batch["attention_mask"]


def by_set(
    name: str, sets: Sequence[str | None], values: Sequence[float], weights: Sequence[float] | None = None
) -> dict[str, float]:
    """The mean of the values of each test set, and as `name` the mean over the sets; the parts where there are several.

    Args:
        name: of the metric.
        sets: the test set of each value.
        values: one for each example.
        weights: of each in the mean of its set; by default all count alike.
    """
    found: dict[str | None, list[tuple[float, float]]] = {}
    for part, value, weight in zip(sets, values, weights or [1.0] * len(values), strict=True):
        found.setdefault(part, []).append((value, weight))
    means = {part: sum(v * w for v, w in pairs) / sum(w for _, w in pairs) for part, pairs in found.items()}
    return {name: fmean(means.values()), **({str(p): m for p, m in means.items()} if len(means) > 1 else {})}


def common(sequences: Sequence[Sequence[Any]]) -> int:
    """How many tokens, or letters, all the sequences begin with."""
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def last_logits(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
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
