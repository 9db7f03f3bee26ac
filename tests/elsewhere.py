"""A process that cannot import isotune, asked by several tests, since starting one takes longer than most questions."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_ELSEWHERE = """
import contextlib, io, json, os, sys, traceback
sys.modules["isotune"] = None
from safetensors.torch import load_file
from pathlib import Path
import torch, transformers
from peft import PeftConfig, PeftModel


def errors_of(place, base, loader, labels):
    errors = []
    tensors = load_file(f"{place}/batch.safetensors")
    expected = tensors.pop("expected")
    pooled = Path(f"{place}/merged/modules.json").exists()
    auto = transformers.AutoModel if pooled else getattr(transformers, loader)
    wide = {"num_labels": expected.shape[-1], "ignore_mismatched_sizes": True} if "Classification" in loader else {}
    merged = auto.from_pretrained(f"{place}/merged", dtype=torch.float32)
    assert not labels or merged.config.id2label == dict(enumerate(labels)), merged.config.id2label
    assert not labels or merged.config.label2id == {label: i for i, label in enumerate(labels)}
    models = [merged]
    if base:
        plain = auto.from_pretrained(base, dtype=torch.float32, **({} if pooled else wide))
        assert PeftConfig.from_pretrained(f"{place}/lora").peft_type == "LORA"
        models.append(PeftModel.from_pretrained(plain, f"{place}/lora"))
    for model in models:
        with torch.no_grad():
            out = model.eval()(**tensors)
            if pooled:
                head = load_file(f"{place}/{'merged' if model is merged else 'lora'}/2_Dense/model.safetensors")
                mask = tensors["attention_mask"].unsqueeze(-1).float()
                mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
                found = mean @ head["linear.weight"].T + head["linear.bias"]
            else:
                found = out.logits
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    return errors


def printed_by(script, folder):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(script, {})
    return printed.getvalue().splitlines()


for line in sys.stdin:
    question = json.loads(line)
    try:
        answer = (printed_by if "script" in question else errors_of)(**question)
        assert not any(name.startswith("isotune.") for name in sys.modules)
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


def asked_elsewhere(**question: Any) -> list[float]:
    """What a process that cannot import isotune finds: how far each model in `place` is from what is expected.

    Args:
        question: `place`, a folder with merged/, lora/ and batch.safetensors; `base`, the base model of lora/, or None
            if there is no lora/; `loader`, the class that loads both; `labels`, the names of the classes, if any.
    """
    return _answer(question)


def printed_elsewhere(script: str, folder: Path) -> list[str]:
    """The lines that a script prints, run in a folder by a process that cannot import isotune."""
    return _answer({"script": script, "folder": str(folder)})


def _answer(question: dict[str, Any]) -> list[Any]:
    elsewhere = _process_without_isotune()
    assert elsewhere.stdin is not None
    assert elsewhere.stdout is not None
    print(json.dumps(question), file=elsewhere.stdin, flush=True)
    answer = json.loads(elsewhere.stdout.readline())
    assert isinstance(answer, list), answer
    return answer


@functools.cache
def _process_without_isotune() -> subprocess.Popen[str]:
    """A process that answers one question a line."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", _ELSEWHERE], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    atexit.register(process.kill)
    return process
