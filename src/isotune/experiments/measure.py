"""What a run is measured by beside its score: bytes kept for backward, memory, forgetting."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isotune.adapter import evaluation


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts, while it is entered, the bytes of distinct storages saved for backward that are not of `model`.

    Tensors may have numbers or, under FakeTensorMode, only shapes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        # By identity, as storages without numbers have no address.
        self._owned = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, Tensor] = {}
        self.nbytes = 0
        self.largest = 0
        """Bytes of the largest storage."""

    def __enter__(self) -> Kept:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        key = id(tensor.untyped_storage())
        if key not in self._owned and key not in self._seen:
            # Alive, or a storage that is freed would give its identity to another, which were then not counted.
            self._seen[key] = tensor
            size = tensor.untyped_storage().nbytes()
            self.nbytes += size
            self.largest = max(self.largest, size)
        return tensor.detach()  # itself, it would be a cycle that no garbage collector sees


@contextlib.contextmanager
def counted_operators() -> Iterator[None]:
    """Let hooks see what the operators' own graph keeps, which is hidden from them elsewhere."""
    hidden = evaluation.hidden_from_hooks
    evaluation.hidden_from_hooks = contextlib.nullcontext
    try:
        yield
    finally:
        evaluation.hidden_from_hooks = hidden


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of distinct storages that `forward` saves for backward; parameters and buffers of `model` not included."""
    with counted_operators(), Kept(model) as kept:
        forward()
    return kept.nbytes


def kept_by_batch(model: Any, batch: Mapping[str, Any], loss: Callable[[Any, Mapping[str, Any]], Tensor]) -> int:
    """Bytes that one training pass of `model` over `batch`, inputs with labels, to its `loss` saves for backward.

    The mode and the random numbers are left as they were.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    training = model.training
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            return kept_bytes(model.train(), lambda: loss(model, inputs))
    finally:
        model.train(training)


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can: on a GPU, and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        # 5 resets the resident set's high-water mark; proc(5), since Linux 4.0.
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """The most memory this process has had: allocated on the GPU where there is one, else resident, in bytes.

    Since `reset_peak_memory`, or else since the process began. None where the system does not tell.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, KeyError):
        # Of this program alone; getrusage also counts what the process was before exec.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def peak_memory_of() -> str:
    """Of what `peak_memory` is the peak: the same for all runs of a machine."""
    return "allocated on the GPU" if torch.cuda.is_available() else "the process's resident memory"


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
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts = general_texts()
        # RoBERTa and its kin use two positions less than they have.
        self.max_length = min(128, (getattr(model.config, "max_position_embeddings", 0) or 130) - 2)
        self.causal = bool(model.can_generate())
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.before: Any = self._look(model) if self.texts else None

    def after(self, model: Any) -> dict[str, Any] | None:
        """The record of the change: {measure, before, after, change, text}; None without a text."""
        if self.before is None:
            return None
        now = self._look(model)
        if self.causal:
            before, after, measure = float(self.before), float(now), "next-token loss"
        else:
            before, measure = 0.0, "mean cosine distance of the sentence embeddings to the base model's"
            after = float((1 - nn.functional.cosine_similarity(self.before, now, dim=-1)).mean())
        python = ".".join(map(str, sys.version_info[:2]))
        return {
            "measure": measure,
            "before": before,
            "after": after,
            "change": after - before,
            "text": f"{len(self.texts)} passages of pydoc_data.topics, Python {python}",
        }

    def _batches(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        # The logits of a language model with a large vocabulary are larger than all else.
        size = 1 if self.causal else 8
        cut = {"padding": True, "padding_side": "right", "truncation": True, "max_length": self.max_length}
        for start in range(0, len(self.texts), size):
            tokens = self.tokenizer(self.texts[start : start + size], return_tensors="pt", **cut)
            yield dict(tokens.to(device))

    def _look(self, model: Any) -> Any:
        """The loss of a causal language model, or the embeddings (texts, width) of an encoder."""
        device = next(model.parameters()).device
        training = model.training
        look = self._loss if self.causal else self._embeddings
        try:
            with torch.no_grad():
                return look(model.eval(), device)
        finally:
            model.train(training)

    def _loss(self, model: Any, device: torch.device) -> float:
        total, count = 0.0, 0
        for batch in self._batches(device):
            # By the attention mask and not by the padding token, which may be the end-of-text token.
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
        return total / count

    def _embeddings(self, model: Any, device: torch.device) -> Tensor:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        found = []
        for batch in self._batches(device):
            hidden = base.base_model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(found).cpu()
