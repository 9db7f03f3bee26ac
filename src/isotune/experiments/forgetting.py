"""How much worse a model becomes at text that it is not trained on."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, __version__

from isotune.experiments import processes
from isotune.experiments.files import storing
from isotune.internals.safetensors_files import readable
from isotune.internals.transformers_state import attention_of
from isotune.whole_files import written_whole


def general_texts(count: int = 64, words: int = 64) -> list[str]:
    """Passages of Python's language reference, which every Python carries as `pydoc_data.topics`.

    Evenly spaced over the reference's paragraphs of prose, each cut to `words` words. Equal for equal versions of
    Python. Empty where the module is left out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    prose = []
    for _, topic in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", topic):
            found = paragraph.split()
            letters = sum(c.isalpha() or c.isspace() for c in paragraph)
            if len(found) >= words // 2 and letters > 0.9 * len(paragraph):
                prose.append(" ".join(found[:words]))
    prose = list(dict.fromkeys(prose))
    chosen = np.linspace(0, len(prose) - 1, min(count, len(prose))).round().astype(int)
    return [prose[i] for i in chosen]


class Forgetting:
    """What a model knew of a general text before its training, to be compared with what it knows after.

    For a causal language model the mean next-token loss. An encoder with a new head has no such loss; for it the
    measure is how far its sentence embeddings (the mean of the last hidden states) have moved from the base model's.

    Args:
        model: before its training.
        tokenizer: of the model.
        folder: one of this base model's, where its values are kept for other runs; None keeps none.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.texts = general_texts()
        # RoBERTa and its kin use two positions less than they have.
        self.max_length = min(128, (getattr(model.config, "max_position_embeddings", 0) or 130) - 2)
        self.causal = bool(model.can_generate())
        self.before: Tensor | None = self._of_base(model, folder) if self.texts else None

    def change(self, model: Any) -> float | None:
        """How much worse the model has become; None without a text."""
        if self.before is None:
            return None
        now = self._look(model)
        if self.causal:
            return float(now) - float(self.before)
        return float((1 - nn.functional.cosine_similarity(self.before, now, dim=-1)).mean())

    def after(self, model: Any, change: float | None = None) -> dict[str, Any] | None:
        """The record of the change; None without a text.

        `change` is that of the model, where it has been measured already.

        `{measure, unit, before, after, change, text}`, and for an encoder `apart`: how far the embeddings of two
        different passages lie from each other in the base model, which says how much a distance is.
        """
        change = self.change(model) if change is None else change
        if change is None or self.before is None:
            return None
        if self.causal:
            before, measure, unit, apart = float(self.before), "next-token loss", "nats a token", {}
        else:
            before, measure = 0.0, "mean cosine distance of the sentence embeddings to the base model's"
            unit, apart = "cosine distance", {"apart": _apart(self.before)}
        python = ".".join(map(str, sys.version_info[:2]))
        return {
            "measure": measure,
            "unit": unit,
            "before": before,
            "after": before + change,
            "change": change,
            **apart,
            "text": f"{len(self.texts)} passages of pydoc_data.topics, Python {python}",
        }

    def _of_base(self, model: Any, folder: Path | None) -> Tensor:
        """The values before training, which are those of every run that starts from the same model."""
        if folder is None:
            return self._look(model)
        device = next(model.parameters()).device.type
        computed = str(model.dtype), device, attention_of(model.config), __version__
        about = repr((self.texts, self.max_length, self.causal, *computed))
        file = folder / f"forgetting-{hashlib.sha256(about.encode()).hexdigest()[:12]}.safetensors"
        if file.exists():
            stored: Tensor = load_file(file)["before"]
            return stored
        found = self._look(model)
        if processes.is_main():
            # Of runs at a time each may write it, as a whole, and what they write is equal.
            with storing(str(file)), written_whole(file) as partial:
                save_file({"before": found}, partial)
                readable(partial)
        return found

    def _batches(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        # The logits of a language model with a large vocabulary are larger than all else.
        size = 1 if self.causal else 8
        cut = {"padding": True, "padding_side": "right", "truncation": True, "max_length": self.max_length}
        starts = range(0, len(self.texts), size)
        for start in processes.with_bar(starts, "measuring what is forgotten", "batch", once=True):
            tokens = self.tokenizer(self.texts[start : start + size], return_tensors="pt", **cut)
            yield dict(tokens.to(device))

    def _look(self, model: Any) -> Tensor:
        """The loss of a causal language model, or the embeddings (texts, width) of an encoder."""
        device = next(model.parameters()).device
        training = model.training
        look = self._loss if self.causal else self._embeddings
        try:
            with torch.no_grad():
                return look(model.eval(), device)
        finally:
            model.train(training)

    def _loss(self, model: Any, device: torch.device) -> Tensor:
        total, count = 0.0, 0
        for batch in self._batches(device):
            # By the attention mask and not by the padding token, which may be the end-of-text token.
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
        return torch.tensor(total / count, dtype=torch.float64)

    def _embeddings(self, model: Any, device: torch.device) -> Tensor:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        found = []
        for batch in self._batches(device):
            hidden = base.base_model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(found).cpu()


def _apart(embeddings: Tensor) -> float:
    """The mean cosine distance of two different rows of (texts, width)."""
    rows = nn.functional.normalize(embeddings, dim=-1)
    count = len(rows)
    alike = float((rows @ rows.T).sum() - count)
    return 1 - alike / max(count * (count - 1), 1)


class ForgettingCurve(TrainerCallback):  # type: ignore[misc]
    """Puts into Trainer's log, beside each score on validation, how much the model has forgotten by then."""

    def __init__(self, forgetting: Forgetting) -> None:
        self.forgetting = forgetting

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Beside the score, so that a resumed run has what was measured before."""
        if state.log_history and processes.is_main():
            state.log_history[-1]["forgetting"] = self.forgetting.change(model)
