"""Language tasks: what is a right answer, and likelihood, loss and generation against plain torch."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from helpers import WORDS, make_tokenizer, tiny_gpt2, tiny_llama
from isotune.experiments import models, tasks
from isotune.experiments.measure import kept_by_batch
from isotune.experiments.recipe import RecipeError, validate
from isotune.experiments.run import Run
from isotune.experiments.tables import DataError

pytest.importorskip("trl")

from isotune.experiments.tasks.commonsense import first_choice
from isotune.experiments.tasks.language import SftLoop
from isotune.experiments.tasks.math import final_number, same_expression

SAID = ["the", "correct", "answer", "is", "blue", "deep", "red", "green"]


def row(question: str, answer: str, choices: str = "blue/red/green") -> dict[str, str]:
    return {
        "instruction": f"{question}\n\nAnswer format: {choices}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


QUESTIONS = [row("w1 w2", "red"), row("w3", "blue"), row("w4 w5 w6 w7", "green"), row("w8 w9 w1", "red")]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotary positions and learnt ones, which padding on the left must not move."""
    folder = tmp_path_factory.mktemp(request.param)
    {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]().save_pretrained(folder)
    make_tokenizer([*SAID, *WORDS[len(SAID) :]]).save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Any = "x", **changes: Any) -> Any:
    raw = {
        "task": "multiple-choice",
        "model": str(model),
        "data": {
            "path": str(folder),
            "files": {"train": "train.json", "test": "test.json"},
            "text": "instruction",
            "label": "answer",
            **changes.pop("data", {}),
        },
        "method": "lora",
        "train": {"eval_batch_size": 3, "max_length": 64},
        **changes,
    }
    return validate(raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(QUESTIONS))
    return tmp_path


def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """By one unpadded sequence, position by position."""
    given, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(scores[at - 1, ids[at]]) for at in range(len(given), len(ids)))


def test_a_prompt_with_the_question_alone_asks_for_the_words_of_the_answer(folder: Path) -> None:
    listed = row("Please choose the correct answer to the question: Which?", "answer2", "answer1/answer2")
    listed["instruction"] = listed["instruction"].replace("\n\n", "\n\nAnswer1: deep blue Answer2: red\n\n", 1)
    named = row("Please answer with a colour, question: Which: one?", "red", "blue/red")
    (folder / "test.json").write_text(json.dumps([listed, {**named, "input": "w1"}]))
    (folder / "train.json").write_text(json.dumps([listed]))
    task = tasks.make(recipe(folder, prompt="Question: {question}\nAnswer:", score="likelihood"))
    first, second = task.splits["test"]
    assert (first.prompt, first.completion) == ("Question: Which?\nAnswer:", " red")
    assert (first.answer, first.choices, task.said("red")) == ("red", ("deep blue", "red"), " red")
    assert (second.prompt, second.completion) == ("Question: Which: one?\n\nw1\nAnswer:", " red")
    assert (second.answer, second.choices) == ("red", ("blue", "red"))
    assert task.splits["train"][0].completion == " red"
    assert task.right(first, "red")
    (folder / "train.json").write_text(json.dumps([{**listed, "instruction": "Which?"}]))
    with pytest.raises(DataError, match="does not end in 'Answer format"):
        tasks.make(recipe(folder, prompt="{question}"))
    for prompt in ("Answer:", "{instruction} {question}"):
        with pytest.raises(RecipeError, match=r"\{instruction\} or \{question\}"):
            tasks.make(recipe(folder, prompt=prompt))


@pytest.mark.parametrize("choices", ["blue/red/green", "blue/deep/red"])
def test_the_likeliest_choice_is_that_of_plain_torch(folder: Path, model: Path, choices: str) -> None:
    answer = choices.split("/")[1]
    rows = [{**row(q["instruction"].split("\n")[0], answer, choices)} for q in QUESTIONS]
    (folder / "test.json").write_text(json.dumps(rows))
    task = tasks.make(recipe(folder, model, score="likelihood"))
    loaded, _ = task.build()
    if choices != "blue/red/green":  # an answer of two words among those of one
        task.said = lambda choice: "the correct answer is deep blue" if choice == "deep" else f"the answer is {choice}"
    found = task.predict(loaded)
    tokenizer = models.tokenizer_for(str(model))
    for question, prediction in zip(task.splits["test"], found, strict=True):
        values = {c: log_likelihood(loaded, tokenizer, question.prompt, task.said(c)) for c in question.choices}
        assert prediction == max(values, key=values.__getitem__)
    assert task.score(found)["accuracy"] == found.count(answer) / 4


def test_the_loss_is_that_of_plain_torch(folder: Path, model: Path) -> None:
    task = tasks.make(recipe(folder, model, score="loss", metric="loss"))
    loaded, _ = task.build()
    tokenizer = models.tokenizer_for(str(model))
    expected = []
    for question in task.splits["test"]:
        answer = question.completion + tokenizer.eos_token
        count = len(tokenizer(question.prompt + answer)["input_ids"]) - len(tokenizer(question.prompt)["input_ids"])
        expected.append(-log_likelihood(loaded, tokenizer, question.prompt, answer) / count)
    assert task.predict(loaded) == pytest.approx(expected, rel=1e-4)
    assert task.score(expected)["loss"] == pytest.approx(sum(expected) / 4)


def test_generation_in_batches_is_that_of_each_alone(folder: Path, model: Path) -> None:
    task = tasks.make(recipe(folder, model, max_new_tokens=5))
    loaded, _ = task.build()
    tokenizer = models.tokenizer_for(str(model))
    alone = []
    for question in task.splits["test"]:
        ids = torch.tensor([tokenizer(question.prompt)["input_ids"]])
        made = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        alone.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert task.predict(loaded) == alone


def test_only_the_answer_is_learnt_and_what_does_not_fit_is_said(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tasks.make(recipe(folder, model))
    tokenizer = models.tokenizer_for(str(model))
    for question, encoded in zip(task.splits["train"], task.encoded.train, strict=True):
        learnt = [token for token in encoded["labels"] if token != -100]
        assert tokenizer.decode(learnt) == f"{question.completion} </s>"
    longest = max(len(encoded["input_ids"]) for encoded in task.encoded.train)
    short = recipe(folder, model, train={"max_length": longest - 6})
    assert len(tasks.make(short).encoded.train) == 3
    assert "1 of the train split are left out" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no question of the train split fits into train\.max_length=3"):
        _ = tasks.make(recipe(folder, model, train={"max_length": 3})).encoded


@pytest.mark.parametrize("counted", [None, 7])
def test_the_loss_without_the_logits_of_the_questions_is_that_of_trl(
    folder: Path, model: Path, counted: int | None, tmp_path: Path
) -> None:
    task = tasks.make(recipe(folder, model))
    loaded, _ = task.build()
    encoded = task.encoded
    run = Run("x", "psoft", "search", task.recipe, 1e-3, 0, "", tmp_path / "out", tmp_path / "run.json")
    loop = SftLoop(
        run,
        [],
        encoded.lengths,
        model=loaded,
        args=encoded.arguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none"),
        train_dataset=encoded.train,
        **encoded.options,
    )
    found = []
    for compute, name in ((loop.compute_loss, "own"), (super(SftLoop, loop).compute_loss, "trl")):
        rows = computed_rows(loaded)
        loss = compute(loaded, task.training_batch(), num_items_in_batch=counted)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in loaded.named_parameters()}, rows))
        loaded.zero_grad(set_to_none=True)
        assert name == "own" or sum(rows) == 0  # TRL multiplies by the head's weight itself
    (own, own_grads, rows), (trl, trl_grads, _) = found
    torch.testing.assert_close(own, trl, rtol=1e-6, atol=1e-6)
    for name, gradient in trl_grads.items():
        torch.testing.assert_close(own_grads[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    batch = task.training_batch()
    labels = batch["labels"]
    assert sum(rows) == len(labels) * int((labels[:, 1:] != -100).any(0).sum()) < labels[:, 1:].numel()
    learnt = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(task.loss(loaded, batch).detach(), trl * (counted or learnt) / learnt)
    if Version(transformers.__version__).release >= (5, 23):  # before, choosing positions copied the hidden states,
        # which so small a vocabulary does not outweigh
        loaded, _ = task.build()  # a model that no trainer has given a sparing loss of its own, as TRL 1.9 does
        assert kept_by_batch(loaded, batch, task.loss) < kept_by_batch(loaded, batch, lambda model, b: model(**b).loss)


def computed_rows(model: Any) -> list[int]:
    """How many rows of logits each later call of the model's head computes."""
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: rows.append(output[..., 0].numel()))
    return rows


def test_several_test_sets_are_scored_each_and_in_the_mean(folder: Path) -> None:
    (folder / "other.json").write_text(json.dumps(QUESTIONS[:2]))
    files = {"train": "train.json", "test": {"one": "test.json", "two": "other.json"}}
    task = tasks.make(recipe(folder, data={"files": files}))
    assert task.about() == {"sets": {"one": 4, "two": 2}}
    said = ["it is red", "BLUE", "red", "nothing", "green", "it is blue or red"]
    assert task.score(said) == {"accuracy": 0.5, "one": 0.5, "two": 0.5}
    (folder / "other.json").write_text("[]")
    with pytest.raises(DataError, match="the test set two is empty"):
        tasks.make(recipe(folder, data={"files": files}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answer": "yellow", "output": "it is yellow"}, "entry 2: the answer 'yellow' is none of blue, red, green"),
        ({"output": "the correct answer is red"}, "does not end in the answer 'blue'"),
        ({"instruction": "w1"}, r"entry 2: the column 'instruction' does not end in 'Answer format"),
        ({"answer": None}, "the column 'answer' holds None"),
    ],
)
def test_a_wrong_question_is_one_line(folder: Path, changed: dict[str, Any], said: str) -> None:
    rows = [dict(question) for question in QUESTIONS]
    rows[1].update(changed)
    (folder / "test.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=said) as caught:
        tasks.make(recipe(folder))
    assert "\n" not in str(caught.value)


def test_the_choice_that_is_named_first_counts() -> None:
    assert first_choice("The correct answer is Answer2, not answer1", ("answer1", "answer2")) == "answer2"
    assert first_choice("answer10", ("answer1", "answer10")) == "answer10"
    assert first_choice("neither", ("true", "false")) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She pays $1,250.50 in all.", "1250.50"),
        ("3 + 4 = 7. The answer is: 7", "7"),
        ("The answer is: 18 apples out of 20", "18"),
        ("#### -42", "-42"),
        ("x\n#### 1,000\n", "1000"),
        ("5 and then 6", "6"),
        ("the answer is: nothing, but 3", "3"),
        ("none", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (r"so it is \boxed{0.5}", True),
        (r"The answer is: \frac{2}{4}", True),
        ("The answer is: $1/2$.", True),
        (r"The answer is: \frac{1}{3}", False),
        ("no idea", False),
        ("The answer is:", False),
    ],
)
def test_expressions_are_compared_by_what_they_mean(prediction: str, right: bool) -> None:
    assert same_expression(r"Thus $x = \boxed{\frac{1}{2}}$.", prediction) is right


def math(folder: Path, solution: str, **changes: Any) -> Any:
    problem = {"question": "w1 w2", "answer": solution}
    (folder / "test.json").write_text(json.dumps([problem]))
    (folder / "train.json").write_text(json.dumps([{"question": "w1", "answer": "w2"}, problem]))
    data = {"text": "question", "label": "answer"}
    return tasks.make(recipe(folder, task="math", data={**data, **changes.pop("data", {})}, **changes))


def test_word_problems_are_judged_by_their_final_answer(folder: Path) -> None:
    assert math(folder, "so\n#### 1,234").score(["it is 1234"]) == {"accuracy": 1.0}
    assert math(folder, "so\n#### 1,234").score(["I see none"]) == {"accuracy": 0.0}
    assert math(folder, r"so \boxed{2\sqrt{3}}").score([r"\boxed{\sqrt{12}}"]) == {"accuracy": 1.0}
    with pytest.raises(DataError, match="the solution has no final answer: expected '#### number'"):
        math(folder, "so it is")
    assert math(folder, "so it is", score="loss", metric="loss").score([0.5]) == {"loss": 0.5}
    with pytest.raises(DataError, match="there is no number after ####"):
        math(folder, "so #### it")
    with pytest.raises(DataError, match=r"has no answer to judge by .* set choose_by=loss"):
        math(folder, "#### 1", data={"hold_out": 1, "split_seed": 1})
    with pytest.raises(RecipeError, match="has no answers to choose from"):
        math(folder, "#### 1", score="likelihood")
    with pytest.raises(RecipeError, match=re.escape("must contain {question}")):
        math(folder, "#### 1", prompt="Q:")
