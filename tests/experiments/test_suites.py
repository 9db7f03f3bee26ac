"""The suites: each recipe takes two steps on a tiny random model of its architecture, with files of its format."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from helpers import VOCABULARY, WORDS, make_tokenizer
from isotune.experiments import loop, reload
from isotune.experiments.recipe import load
from isotune.experiments.run import run

GLUE = ("cola", "stsb", "mrpc", "rte", "sst2", "qnli", "mnli", "qqp")
QUICK = ["method.r=4", "train.epochs=1", "train.max_steps=2", "train.batch_size=4", "train.max_length=16"]


@pytest.fixture(scope="session")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeBERTa-v2 without a head, as the published one, two layers of width 32."""
    from transformers import DebertaV2Config, DebertaV2Model

    folder = tmp_path_factory.mktemp("deberta")
    torch.manual_seed(0)
    DebertaV2Model(
        DebertaV2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            pooler_hidden_size=32,
        )
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def sentence(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(3, 8)))


# What the columns of the GLUE download are called, and its labels.
GLUE_COLUMNS = {
    "stsb": ["index", "genre", "filename", "year", "source1", "source2", "sentence1", "sentence2", "score"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "rte": ["index", "sentence1", "sentence2", "label"],
    "sst2": ["sentence", "label"],
    "qnli": ["index", "question", "sentence", "label"],
    "mnli": ["index", "promptID", "pairID", "genre", "sentence1", "sentence2", "label1", "gold_label"],
    "qqp": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
}
GLUE_LABELS = {
    "stsb": ["0.000", "2.500", "5.000"],
    "rte": ["entailment", "not_entailment"],
    "qnli": ["not_entailment", "entailment"],
    "mnli": ["neutral", "entailment", "contradiction"],
}


def write_glue(folder: Path, task: str) -> None:
    chance = random.Random(0)
    labels = GLUE_LABELS.get(task, ["0", "1"])
    if task == "cola":
        names = {"in_domain_train.tsv": 12, "in_domain_dev.tsv": 6, "out_of_domain_dev.tsv": 6}
        columns = ["source", "label", "star", "sentence"]
    else:
        names = {"train.tsv": 12, "dev_matched.tsv" if task == "mnli" else "dev.tsv": 12}
        columns = GLUE_COLUMNS[task]
    for name, count in names.items():
        lines = [] if task == "cola" else ["\t".join(columns)]
        for number in range(count):
            label = labels[number % len(labels)]
            lines.append(
                "\t".join(
                    label if column in ("label", "score", "Quality", "gold_label", "is_duplicate") else sentence(chance)
                    for column in columns
                )
            )
        (folder / name).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("task", GLUE)
def test_nlu(task: str, deberta: Path, tmp_path: Path) -> None:
    write_glue(tmp_path, task)
    name = f"glue/{task}"
    result = run(load(name, [f"model={deberta}", f"data.path={tmp_path}", f"output={tmp_path / 'run'}", *QUICK]))
    entry = result["runs"][0]
    assert result["metric"] in result["metrics"]
    assert (result["data"]["validation"], result["data"]["test"]) == (6, 6)
    assert entry["best_step"] == 2
    assert all(loop.math.isfinite(value) for value in entry["test"].values())
    # Twelve linear layers of width 32 and 48 with r(r − 1)/2 + 2r each; the new pooler and the classifier.
    outputs = {"stsb": 1, "mnli": 3}.get(task, 2)
    assert entry["head_parameters"] == 32 * 33 + 33 * outputs
    assert entry["trainable_parameters"] == 12 * 14 + entry["head_parameters"]
    if task in ("stsb", "rte"):
        found = reload.score(tmp_path / "run", "psoft")
        for kind in ("reloaded", "merged"):
            assert found[kind][result["metric"]] == pytest.approx(result["metrics"][result["metric"]], abs=1e-5)
