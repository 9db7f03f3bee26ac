"""The suites: each recipe takes two steps on a tiny random model of its architecture, with files of its format."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from exports import assert_exports
from helpers import WORDS, make_tokenizer, tiny_llama
from isotune.experiments import paper, reload, suites
from isotune.experiments.budget import adapter_parameters
from isotune.experiments.loading import load, packaged
from isotune.experiments.recipe import RecipeError
from isotune.experiments.tables import DataError
from trainings import run

GLUE = ("cola", "stsb", "mrpc", "rte", "sst2", "qnli", "mnli", "qqp")
VTAB = tuple(name.removeprefix("vtab/") for name in packaged() if name.startswith("vtab/"))
QUICK = ["method.r=4", "train.epochs=1", "train.max_steps=2", "train.batch_size=4", "train.max_length=16"]


@pytest.fixture(scope="session")
def vtab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images and the list files of every task, as VTAB-1K is published, of the first and the last class."""
    from PIL import Image

    root = tmp_path_factory.mktemp("vtab-1k")
    for name in VTAB:
        data = load(f"vtab/{name}").data
        folder = root / str(data.folder)
        (folder / "images").mkdir(parents=True)
        for number in range(4):
            shade = 60 * number
            Image.new("RGB" if number else "L", (20, 24), (shade, 0, 255 - shade) if number else 9).save(
                folder / "images" / f"{number}.png"
            )
        lines = "".join(f"images/{number}.png {number % 2 * (data.classes - 1)}\n" for number in range(4))
        for file in ("train800.txt", "val200.txt", "test.txt"):
            (folder / file).write_text(lines)
    return root


# A word-level vocabulary in which the answers are words of their own.
SAID = ["the", "correct", "answer", "is", "true", "false", "Answer", "format", "Question", "####", "The", "$", "boxed"]
SAID += [f"{kind}{number}" for kind in ("answer", "solution", "option", "ending") for number in range(1, 6)]
SAID += [str(number) for number in range(10)]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 64, two layers, with a tokeniser of the words that answers are made of."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    make_tokenizer([*SAID, *WORDS[len(SAID) :]]).save_pretrained(folder)
    return folder


# The answers that each test set of LLM-Adapters offers.
CHOICES = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "siqa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "arc_easy": ("answer1", "answer2", "answer3", "answer4"),
    "arc_challenge": ("answer1", "answer2", "answer3", "answer4"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}


def choice(chance: random.Random, choices: Sequence[str]) -> dict[str, str]:
    answer = chance.choice(list(choices))
    return {
        "instruction": f"Question: {sentence(chance)}\n\nAnswer format: {'/'.join(choices)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.fixture(scope="session")
def commonsense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commonsense-15K and the eight test sets as LLM-Adapters has them, a few questions each."""
    root, chance = tmp_path_factory.mktemp("commonsense"), random.Random(0)
    rows = [choice(chance, choices) for choices in CHOICES.values()]
    (root / "commonsense_15k.json").write_text(json.dumps(rows))
    files = load("commonsense/all").data.files
    assert files is not None
    assert isinstance(files.test, dict)
    for task, names in files.test.items():
        (root / names[0]).parent.mkdir()
        (root / names[0]).write_text(json.dumps([choice(chance, CHOICES[task]) for _ in range(4)]))
    return root


@pytest.fixture(scope="session")
def mathematics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MetaMathQA-40K, GSM8K and MATH, a few problems each."""
    root, chance = tmp_path_factory.mktemp("math"), random.Random(0)
    solved = [{"query": sentence(chance), "response": f"{sentence(chance)} The answer is: {n}"} for n in range(8)]
    (root / "MetaMathQA-40K.json").write_text(json.dumps(solved))
    rows = {
        "gsm8k": [{"question": sentence(chance), "answer": f"{sentence(chance)}\n#### {n}"} for n in range(4)],
        "math": [{"problem": sentence(chance), "solution": f"so $\\boxed{{{n}}}$"} for n in range(4)],
    }
    for name, problems in rows.items():
        (root / name).mkdir()
        (root / name / "test.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return root


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


@pytest.mark.covered(task=("stsb",))
@pytest.mark.parametrize("task", GLUE)
@pytest.mark.slow
def test_nlu(task: str, deberta: Path, tmp_path: Path) -> None:
    write_glue(tmp_path, task)
    name = f"glue/{task}"
    result = run(load(name, [f"model={deberta}", f"data.path={tmp_path}", f"output={tmp_path / 'run'}", *QUICK]))
    entry = result["runs"][0]
    assert result["metric"] in result["metrics"]
    assert (result["data"]["validation"], result["data"]["test"]) == (6, 6)
    assert entry["best_step"] == 2
    assert all(math.isfinite(value) for value in entry["test"].values())
    # Twelve linear layers of width 32 and 48 with r(r − 1)/2 + 2r each; the new pooler and the classifier.
    outputs = {"stsb": 1, "mnli": 3}.get(task, 2)
    assert entry["head_parameters"] == 32 * 33 + 33 * outputs
    assert entry["trainable_parameters"] == 12 * 14 + entry["head_parameters"]
    if task in ("stsb", "rte"):
        found = reload.score(tmp_path / "run", "psoft")
        for kind in ("reloaded", "merged"):
            assert found[kind][result["metric"]] == pytest.approx(result["metrics"][result["metric"]], abs=1e-3)
            assert found[kind]["changed"] == 0
        assert_exports(tmp_path / "run", "psoft", tmp_path / "exported")  # of a number and of named classes


@pytest.mark.slow
@pytest.mark.parametrize("task", VTAB)
def test_vision(task: str, vit: Path, vtab: Path, tmp_path: Path) -> None:
    recipe = load(
        f"vtab/{task}",
        [f"model={vit}", f"data.path={vtab}", f"output={tmp_path / 'run'}", *QUICK, "train.lr=1e-3"],
    )
    result = run(recipe)
    entry = result["runs"][0]
    assert result["metric"] == "accuracy"
    assert [result["data"][split] for split in ("train", "validation", "test")] == [4, 4, 4]
    # Twelve linear layers and a head of the task's classes; a patch embedding is a convolution and stays.
    assert entry["head_parameters"] == 33 * recipe.data.classes
    assert entry["trainable_parameters"] == 12 * 14 + entry["head_parameters"]
    assert [row["step"] for row in entry["curve"] if "validation_loss" in row] == [1, 2]
    if task == "cifar100":
        expected = {"accuracy": result["metrics"]["accuracy"], "changed": 0}
        assert reload.score(tmp_path / "run", "psoft") == {"reloaded": expected, "merged": expected}
        assert_exports(tmp_path / "run", "psoft", tmp_path / "exported")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("images/9.png 0", r"train800\.txt, line 1: there is no image .*9\.png"),
        ("images/text.png 0", r"train800\.txt, line 1: .*text\.png is no image that can be read"),
        ("images/0.png 10", r"train800\.txt, line 1: the label '10' is none of the task's labels \(0, 1, .* 9\)"),
        ("images/0.png", r"train800\.txt, line 1: expected the path of an image, a space and its label"),
        ("", r"train800\.txt is empty"),
    ],
)
def test_wrong_images_are_one_line_before_any_model_is_looked_for(
    vtab: Path, tmp_path: Path, line: str, said: str
) -> None:
    shutil.copytree(vtab / "eurosat", tmp_path / "eurosat")
    (tmp_path / "eurosat" / "images" / "text.png").write_text("no image")
    (tmp_path / "eurosat" / "train800.txt").write_text(line + "\n")
    # The folder of the task itself will do.
    recipe = load(
        "vtab/eurosat", [f"data.path={tmp_path / 'eurosat'}", "model=/no/such/model", f"output={tmp_path}/run"]
    )
    with pytest.raises(DataError, match=said) as caught:
        run(recipe)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_image_that_breaks_off_is_named(vtab: Path, vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vtab / "eurosat", tmp_path / "eurosat")
    image = tmp_path / "eurosat" / "images" / "1.png"
    image.write_bytes(image.read_bytes()[:50])  # its header is whole
    recipe = load("vtab/eurosat", [f"data.path={tmp_path}", f"model={vit}", f"output={tmp_path}/run", *QUICK])
    with pytest.raises(DataError, match=r"cannot read the image .*1\.png"):
        run(recipe)


def test_vtab_has_three_groups_whose_means_are_averaged() -> None:
    assert {group: len(tasks) for group, tasks in suites.groups("vtab").items()} == {
        "natural": 7,
        "specialised": 4,
        "structured": 8,
    }
    scores = {f"vtab/{task}": 0.5 for task in VTAB}
    for task in suites.groups("vtab")["specialised"]:
        scores[task] = 0.8
    means = suites.means("vtab", scores)
    assert means == pytest.approx({"natural": 0.5, "specialised": 0.8, "structured": 0.5, "mean": 0.6})
    del scores["vtab/dmlab"]
    assert set(suites.means("vtab", scores)) == {"natural", "specialised"}  # no mean of a part that is incomplete
    six = ("cola", "stsb", "rte", "mrpc", "sst2", "qnli")
    assert suites.means("glue", {f"glue/{task}": 0.25 for task in six}) == {"mean": 0.25}
    with pytest.raises(ValueError, match="there is no suite 'glu'"):
        suites.means("glu", {})


@pytest.mark.slow
def test_the_papers_35_tasks_are_recipes_with_its_parameters_and_a_figure_beside_them() -> None:
    tasks = [name for suite in paper.MODELS for names in suites.groups(suite).values() for name in names]
    assert len(tasks) == 6 + 19 + 2 + 8
    listed = {line.split()[0]: line for line in suites.listing().partition("\n\n")[0].splitlines()}
    assert set(listed) == {"recipe", *packaged()}
    for name in tasks:
        recipe = load(name)
        count = adapter_parameters(recipe)
        assert count is not None
        figure = paper.figures(name)["psoft"]
        assert count == pytest.approx(1e6 * figure.parameters, rel=0.06)  # the paper rounds 0.0811 to 0.08
        for shown in (recipe.metric, f"{count:,}"):
            assert shown in listed[name]
    # 36 layers of the encoder, r (r − 1) / 2 + 2 r each; a model of one's own is not known beforehand.
    assert adapter_parameters(load("demo")) == 36 * (46 * 45 // 2 + 2 * 46)
    assert adapter_parameters(load("demo", ["model=my/model"])) is None


def test_recipes_are_listed_by_suite_in_a_hundred_columns() -> None:
    offline = ["demo", "docstrings", "few-shot/digits", "few-shot/mnist"]
    for prefix in ("", "glue/", "vtab/"):
        lines = suites.listing(prefix).splitlines()
        assert max(map(len, lines)) <= 100
        listed = [line.split()[0] for line in lines[1 : lines.index("")]]
        named = [name for name in packaged() if name.startswith(prefix)]
        assert listed == [name for name in offline if name in named] + [name for name in named if name not in offline]
    assert "of microsoft/deberta-v3-base" in suites.listing("glue/")
    assert suites.listing().endswith("\nvariant=authors is for commonsense/, glue/, math/, vtab/")
    assert "variant" not in suites.listing("demo")
    assert f"\nno network is needed for {', '.join(offline)}\n" in suites.listing()
    with pytest.raises(RecipeError, match=r"no recipe 'glu/'; there are arc/, .*demo, .*glue/.*did you mean"):
        suites.listing("glu/")


@pytest.mark.slow
def test_a_recipe_printed_whole_is_the_recipe(tmp_path: Path) -> None:
    for name in packaged():
        file = tmp_path / "mine.yaml"
        file.write_text(suites.whole(name), encoding="utf-8")
        assert load(str(file), ["output=x"]) == load(name, ["output=x"])


SHORT = ["train.gradient_accumulation=2", "train.max_length=128", "max_new_tokens=4", "dtype=float32"]


def trained(name: str, model: Path, data: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """Two steps of a recipe for a language model."""
    given = [f"model={model}", f"data.path={data}", f"output={output}", *QUICK, *SHORT, *overrides]
    return run(load(name, given))


@pytest.mark.slow
@pytest.mark.parametrize("task", [*CHOICES, "all"])
def test_commonsense(task: str, llama: Path, commonsense: Path, tmp_path: Path) -> None:
    result = trained(f"commonsense/{task}", llama, commonsense, tmp_path / "run")
    entry = result["runs"][0]
    # q, k, v, up and down of two layers; no head is added to a language model.
    assert (entry["trainable_parameters"], entry["head_parameters"]) == (10 * 14, 0)
    assert result["data"]["test"] == (32 if task == "all" else 4)
    assert set(result["metrics"]) == {"accuracy", *(CHOICES if task == "all" else ())}
    assert entry["best_step"] == 2
    assert entry["untrained"] is None  # to let it write answers takes as long as the test
    if task == "all":
        assert_exports(tmp_path / "run", "psoft", tmp_path / "exported")
    else:
        # Which answers are right is kept, and what follows from it.
        assert set(entry["answers"]["references"].split()) == {"1"}
        hits = [float(hit) for hit in entry["answers"]["predictions"].split()]
        assert sum(hits) / len(hits) == pytest.approx(result["metrics"]["accuracy"])
        assert entry["interval"]["how"] == "Wilson"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gsm8k", "math", "all"])
def test_math(task: str, llama: Path, mathematics: Path, tmp_path: Path) -> None:
    result = trained(f"math/{task}", llama, mathematics, tmp_path / "run", "data.hold_out=2")
    entry = result["runs"][0]
    assert entry["trainable_parameters"] == 14 * 14
    assert set(result["metrics"]) == {"accuracy", *(("gsm8k", "math") if task == "all" else ())}
    # Chosen by the loss of what is held out, which TRL and we compute alike.
    last = [row for row in entry["curve"] if "validation_loss" in row][-1]
    assert entry["validation"]["loss"] == pytest.approx(last["validation_loss"], rel=0.05)
    if task == "all":
        assert_exports(tmp_path / "run", "psoft", tmp_path / "exported")


@pytest.mark.slow
def test_the_small_recipes_score_several_sets_by_likelihood_and_solutions_by_their_loss(
    llama: Path, commonsense: Path, mathematics: Path, tmp_path: Path
) -> None:
    own = ["data.files.train=ARC-Easy/test.json", "data.hold_out=2"]
    for name in ("arc/gemma", "arc/gemma-words"):
        result = trained(name, llama, commonsense, tmp_path / name, *own)
        assert set(result["metrics"]) == {"accuracy", "arc_easy", "arc_challenge"}
        assert result["data"]["sets"] == {"arc_easy": 4, "arc_challenge": 4}
        assert result["runs"][0]["interval"] is None
    own = ["data.files.train=test.jsonl", "data.hold_out=2"]
    result = trained("gsm8k/gemma", llama, mathematics / "gsm8k", tmp_path / "gsm8k", *own)
    assert result["metrics"].keys() == {"loss"}
    assert result["runs"][0]["answers"] is None
    assert result["runs"][0]["untrained"]["loss"] == pytest.approx(result["metrics"]["loss"], rel=0.5)
    assert 0 < result["metrics"]["loss"] < 10
    found = reload.score(tmp_path / "gsm8k", "psoft")
    for kind in ("reloaded", "merged"):
        assert found[kind]["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
        assert found[kind]["changed"] == 0
    assert_exports(tmp_path / "gsm8k", "psoft", tmp_path / "exported")
