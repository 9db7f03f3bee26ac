"""Classifiers on the mean of an encoder's hidden states, which transformers lacks, in forms that others can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isotune.files.tensors import save_tensors
from isotune.tuner.state import KEY_PREFIX

ENCODER = "encoder."
"""Prefix of the encoder's module names in the classifier."""
HEAD = "classifier"
"""Name of the last layer."""

_COPIED = ("sentence_bert_config.json", "sentence_transformers_config.json")


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy for logits (batch, classes), or mean squared error for (batch, 1)."""
    if logits.shape[-1] == 1:
        return nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    return nn.functional.cross_entropy(logits, labels)


class MeanPooled:
    """A mean-pooled classifier with an `encoder`, a `dropout` and a `classifier`, and its form for other libraries.

    input_ids, attention_mask: (batch, tokens); logits: (batch, classes).
    """

    encoder: Any
    dropout: Any
    classifier: Any

    def embed(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
        """The pooled embedding that the head reads: (batch, hidden)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return torch.as_tensor((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Return a SequenceClassifierOutput: the logits, and the mean loss if labels (batch,) are given."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        for unused in ("output_attentions", "output_hidden_states", "return_dict", "inputs_embeds"):
            inputs.pop(unused, None)  # PEFT's wrapper always passes them
        logits = self.classifier(self.dropout(self.embed(input_ids, attention_mask, **inputs)))
        loss = None if labels is None else loss_of(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_for_others(self, folder: Path) -> None:
        """Write the encoder as a plain transformers model, in a complete sentence-transformers folder."""
        self.encoder.save_pretrained(str(folder))
        head = {f"linear.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        save_sentence_transformer(folder, head, str(getattr(self.encoder, "name_or_path", "")))


class MeanPooledEncoder(MeanPooled, nn.Module):
    """A mean-pooled classifier for loading an adapter that was trained on one.

    Args:
        encoder: a plain transformers model.
        classes: number of outputs of the head, which is random until an adapter is loaded.
    """

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = encoder.config
        self.dropout = nn.Dropout(getattr(self.config, "hidden_dropout_prob", 0.1))
        self.classifier = nn.Linear(self.config.hidden_size, classes)
        self.name_or_path = str(getattr(encoder, "name_or_path", ""))


def load_encoder(path: str, **options: Any) -> Any:
    """Load a plain encoder without its pooling layer, which mean pooling does not use."""
    import transformers

    try:
        return transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, **options)
    except TypeError:  # not every encoder has a pooling layer to leave out
        return transformers.AutoModel.from_pretrained(path, **options)


def head_of(file: Path) -> tuple[int, set[str]]:
    """The number of classes of the head in an adapter file, and the modules of an encoder that it adapts, if any.

    Returns:
        The number of classes, 0 without a head; and, if the adapter may belong to a `MeanPooled` classifier, the names
        of the adapted modules within its encoder.
    """
    if not file.is_file():
        return 0, set()
    try:
        with safe_open(file, framework="pt") as opened:
            keys = {key.removeprefix(KEY_PREFIX): key for key in opened.keys()}  # noqa: SIM118 (not a dictionary)
            heads = [keys[f"{name}.weight"] for name in (HEAD, "score", f"{HEAD}.out_proj") if f"{name}.weight" in keys]
            classes = opened.get_slice(heads[0]).get_shape()[0] if heads else 0
    except SafetensorError:
        return 0, set()  # loading the file will report the error
    adapted = {key.partition(".isotune_")[0] for key in keys if ".isotune_" in key}
    pooled = f"{HEAD}.weight" in keys and all(name.startswith(ENCODER) for name in adapted)
    return classes, {name.removeprefix(ENCODER) for name in adapted} if pooled else set()


def save_sentence_transformer(folder: Path, head: Mapping[str, Tensor], base: str) -> None:
    """Write beside an encoder or its adapter what sentence-transformers needs, so that `encode` gives the logits.

    Args:
        folder: the folder with the encoder's own files.
        head: the linear layer's "linear.weight" (classes, hidden) and "linear.bias" (classes,).
        base: the folder of the base model, whose settings (such as the maximum length) are copied if it has any.

    Source: the folders that sentence-transformers 2 to 6 writes and reads.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    classes, hidden = head["linear.weight"].shape
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ],
    )
    _write(
        folder / "1_Pooling/config.json",
        {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    )
    _write(
        folder / "2_Dense/config.json",
        {
            "in_features": hidden,
            "out_features": classes,
            "bias": "linear.bias" in head,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    save_tensors(head, folder / "2_Dense/model.safetensors")
    for name in _COPIED:
        if (Path(base) / name).is_file():
            shutil.copyfile(Path(base) / name, folder / name)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
