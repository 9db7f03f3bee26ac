"""Both exports of a trained run, loaded by a process that cannot import isotune, beside what was trained."""

from __future__ import annotations

import atexit
import functools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import isotune_cli as cli
from isotune.experiments import models, tasks
from isotune.experiments.files import read_object
from isotune.experiments.recipe import Recipe
from isotune.files.base_model import quiet

_ELSEWHERE = """
import json, sys, traceback
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
    assert not any(name.startswith("isotune.") for name in sys.modules)
    return errors


for line in sys.stdin:
    try:
        answer = errors_of(**json.loads(line))
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


def assert_exports(output: Path, folder: str, place: Path) -> None:
    """Export the adapter of a finished run both ways; each computes what was trained, without isotune.

    Args:
        output: of the run.
        folder: of the method in it.
        place: a new folder to write to.
    """
    place.mkdir()
    for kind in ("lora", "merged"):
        done = CliRunner().invoke(
            cli.app,
            ["export", str(output / folder / "adapter"), "--to", kind, "-o", str(place / kind)],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
    mask = os.umask(0)
    os.umask(mask)
    for file in (*place.rglob("*.*"), *(output / folder / "adapter").glob("*.*")):
        assert file.is_dir() or stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file
    recipe = Recipe.model_validate(read_object(output / "experiment.json")["recipe"])
    task = tasks.make(recipe)
    with quiet():
        model = models.restore(task.build()[0], output / folder / "adapter", recipe.method.name)
    batch: dict[str, Any] = {k: v for k, v in task.training_batch().items() if k != "labels"}
    with torch.no_grad():
        expected: Tensor = model(**batch).logits
    save_file({**batch, "expected": expected.contiguous()}, place / "batch.safetensors")
    loader = {
        "text": "AutoModelForSequenceClassification",
        "image": "AutoModelForImageClassification",
    }.get(recipe.task.split("-")[0], "AutoModelForCausalLM")
    base = str(json.loads((output / folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"])
    labels = task.about().get("labels", [])
    errors = asked_elsewhere(place=str(place), base=base, loader=loader, labels=labels)
    assert len(errors) == 2
    assert max(errors) < 1e-4, errors


def asked_elsewhere(**question: Any) -> list[float]:
    """What a process that cannot import isotune finds: how far each model in `place` is from what is expected.

    Args:
        question: `place`, a folder with merged/, lora/ and batch.safetensors; `base`, the base model of lora/, or None
            if there is no lora/; `loader`, the class that loads both; `labels`, the names of the classes, if any.
    """
    elsewhere = _process_without_isotune()
    assert elsewhere.stdin is not None
    assert elsewhere.stdout is not None
    print(json.dumps(question), file=elsewhere.stdin, flush=True)
    answer = json.loads(elsewhere.stdout.readline())
    assert isinstance(answer, list), answer
    return answer


@functools.cache
def _process_without_isotune() -> subprocess.Popen[str]:
    """A process that checks one folder a line; starting it takes as long as many checks."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", _ELSEWHERE], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    atexit.register(process.kill)
    return process
