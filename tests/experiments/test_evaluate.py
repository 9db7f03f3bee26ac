"""`isotune eval`: an adapted model through lm-evaluation-harness, where that is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers import WORDS
from isotune.experiments.evaluate import evaluate, table
from isotune.versions import install
from isotune_cli import app

runner = CliRunner()
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: ["w1", "w2"]
metric_list: [{{metric: acc}}]
"""


def test_without_the_harness_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    done = runner.invoke(app, ["eval", str(tmp_path), "--tasks", "gsm8k"])
    assert done.exit_code == 2
    assert done.stderr == f"error: evaluation needs lm-evaluation-harness: {install('eval')}\n"


def test_the_table_names_metric_filter_and_standard_error() -> None:
    row = {"alias": 1, "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.0125, "acc": 0.5}
    lines = table({"gsm8k": row}).splitlines()
    assert [line.split() for line in lines] == [
        ["gsm8k", "exact_match", "(strict)", "0.2500", "±", "0.0125"],
        ["gsm8k", "acc", "0.5000"],
    ]


def test_the_table_says_where_there_is_no_number() -> None:
    row = {"exact_match,strict": 1.0, "exact_match_stderr,strict": None, "perplexity": None}
    assert [line.split() for line in table({"gsm8k": row}).splitlines()] == [
        ["gsm8k", "exact_match", "(strict)", "1.0000"],
        ["gsm8k", "perplexity", "no", "number"],
    ]


@pytest.mark.slow
def test_the_adapted_model_is_what_is_scored(
    language_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an optional extra")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from isotune import PeftModel

    rows = [{"question": f"{WORDS[i + 5]} {WORDS[i + 9]}", "label": i % 2} for i in range(12)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    output = tmp_path / "scores.json"
    found = evaluate(str(language_adapter), ["tiny"], include=str(tmp_path / "tasks"), output=str(output))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    first, second = tokenizer("w1 w2")["input_ids"]

    def accuracy(model: torch.nn.Module) -> float:
        right = 0
        for row in rows:
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer(row["question"])["input_ids"]])).logits[0, -1]
            right += int(logits[second] > logits[first]) == row["label"]
        return right / len(rows)

    before = accuracy(base)
    after = accuracy(PeftModel.from_pretrained(base, str(language_adapter)).eval())
    assert before != after  # else the adapter need not have been there
    assert found["tiny"]["acc"] == pytest.approx(after)
    assert json.loads(output.read_text())["results"] == found
    once = evaluate(str(language_adapter), ["tiny"], limit=1, include=str(tmp_path / "tasks"), output=str(output))
    assert once["tiny"].get("acc_stderr") is None  # of one question there is none
    assert json.loads(output.read_text())["results"] == once
    with pytest.raises(ValueError, match="has no task 'no_such_task'"):
        evaluate(str(language_adapter), ["no_such_task"])
