"""Data of one's own: conversations, completions, preferences and folders of images, read, checked and learnt from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

pytest.importorskip("trl")

from chats import TEMPLATE, chat_tokenizer, said, words
from helpers import WORDS
from isotune import PsoftConfig, get_peft_model
from isotune.experiments import loop, reload, tasks
from isotune.experiments.models import ModelError
from isotune.experiments.preview import preview
from isotune.experiments.recipe import Recipe, RecipeError, validate
from isotune.experiments.tables import DataError, Row
from isotune.experiments.tasks.causal import IGNORED
from isotune.experiments.tasks.conversations import ChatTemplate, Dialogue, messages
from isotune.experiments.tasks.preference import Preference
from isotune.experiments.train import plan
from trainings import run

MARKED = TEMPLATE.replace(
    "{{ m['content'] }} {{ eos_token }} ",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} {{ eos_token }}{% endgeneration %} "
    "{% else %}{{ m['content'] }} {{ eos_token }} {% endif %}",
)
LAST_ONLY = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['role'] }} {{ m['content'] }} "
    "{{ eos_token }} {% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
"""It leaves out what the assistant has said before, so that no beginning of a conversation is rendered as such."""
TURNS = said("system", 1) + said("user", 2) + said("assistant", 3) + said("user", 4) + said("assistant", 5)


def tokenizer_with(template: str | None) -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def own(chat_model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe for rows of one's own, of one epoch."""

    def make(task: str, rows: list[dict[str, Any]], **changes: Any) -> Recipe:
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"epochs": 1, "batch_size": 4, "lr": 0.02, "max_length": 64, **changes.pop("train", {})}
        data = {"path": str(tmp_path), "files": {"train": "own.jsonl"}, **changes.pop("data", {})}
        raw = {
            "task": task,
            "model": str(chat_model),
            "data": data,
            "method": {"name": "psoft", "r": 4},
            "train": settings,
        }
        return validate({**raw, "output": str(tmp_path / "run"), **changes})

    return make


def chats(count: int) -> list[dict[str, Any]]:
    return [{"messages": said("user", i) + said("assistant", i + 20)} for i in range(count)]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": said("user", i), "chosen": said("assistant", i + 20), "rejected": said("assistant", i + 40)}
        for i in range(count)
    ]


def learnt_text(template: ChatTemplate, dialogue: Dialogue) -> list[str]:
    ids, mask = template.tokens(dialogue)
    text = template.tokenizer.apply_chat_template([*dialogue.prompt, *dialogue.completion], tokenize=False)
    assert ids == template.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = template.tokenizer.convert_ids_to_tokens(ids)
    return [token for token, learnt in zip(tokens, mask, strict=True) if learnt]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["by prefixes", "by marks"])
def test_all_turns_of_the_assistant_are_learnt_and_nothing_else(template: str) -> None:
    found = ChatTemplate(tokenizer_with(template), "m")
    assert found.marked == (template == MARKED)
    first, last = ([*words(start).split(), "</s>"] for start in (3, 5))
    assert learnt_text(found, Dialogue([], TURNS, None, "here")) == [*first, *last]
    # As a completion the last turn alone is: what stands in the prompt has been said already.
    assert learnt_text(found, Dialogue(TURNS[:4], TURNS[4:], None, "here")) == last


@pytest.mark.parametrize("name", ["deepseekv3", "gemma3", "gptoss", "llama3", "phi3", "qwen2_5", "qwen3", "glm4moe"])
def test_templates_of_models_are_learnt_by_turns(name: str) -> None:
    """With a tokenizer that drops white space, at which the marks of some templates end."""
    template = resources.files("trl") / "chat_templates" / f"{name}.jinja"
    tokenizer = tokenizer_with(template.read_text(encoding="utf-8"))
    for turns in (TURNS, TURNS[1:]):
        for prompt, heard in ((0, (3, 5)), (len(turns) - 1, (5,))):
            dialogue = Dialogue(turns[:prompt], turns[prompt:], None, "here")
            ids, mask = ChatTemplate(tokenizer, "m").tokens(dialogue)
            tokens = tokenizer.convert_ids_to_tokens(ids)
            learnt = [token for token, own in zip(tokens, mask, strict=True) if own and token in WORDS]
            assert learnt == [word for start in heard for word in words(start).split()]


def test_a_template_that_renders_prefixes_otherwise_is_refused() -> None:
    found = ChatTemplate(tokenizer_with(LAST_ONLY), "m")
    with pytest.raises(DataError, match=r"here: the chat template of m renders message 3 otherwise"):
        found.tokens(Dialogue([], TURNS, None, "here"))
    assert learnt_text(found, Dialogue([], TURNS[1:3], None, "here"))[-1] == "</s>"


def test_errors_of_a_template_name_the_row() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 7: the chat template of m does not take .*: roles must alternate"):
        ChatTemplate(tokenizer_with(strict), "m").tokens(Dialogue([], TURNS, None, "line 7"))
    with pytest.raises(ModelError, match="the tokeniser of m has no chat template: take a model"):
        ChatTemplate(tokenizer_with(None), "m")


def test_tools_reach_the_template(own: Callable[..., Recipe]) -> None:
    template = "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}" + TEMPLATE
    tool = {"type": "function", "function": {"name": "w9", "parameters": {}}}
    call = {"role": "assistant", "content": None, "tool_calls": [tool]}
    answered = {"role": "tool", "content": "w3"}
    rows = [
        {"messages": [*said("user", i), call, answered, *said("assistant", i)], "tools": tools}
        for i, tools in enumerate(([tool], json.dumps([tool]), None))
    ]
    task = tasks.make(own("chat", rows))
    found = sorted(task.splits["train"] + task.splits["validation"] + task.splits["test"], key=lambda d: d.where)
    rendered = [ChatTemplate(tokenizer_with(template), "m").tokens(dialogue)[0] for dialogue in found]
    name = chat_tokenizer().convert_tokens_to_ids("w9")
    assert [ids[0] == name for ids in rendered] == [True, True, False]


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    row = Row({"messages": [{"role": "user", "content": parts}, *said("assistant", 1)]}, "here")
    assert messages(row, "messages") == [{"role": "user", "content": "w1 w2"}, *said("assistant", 1)]


@pytest.mark.parametrize(
    ("task", "row", "error"),
    [
        ("chat", {"text": "a"}, r"own\.jsonl, line 2: there is no column 'messages'; there are text"),
        ("chat", {"messages": []}, r"line 2: the column 'messages' holds \[\], not a list of messages"),
        ("chat", {"messages": "hello"}, "holds 'hello', not a list of messages"),
        ("chat", {"messages": ["hello"]}, "message 1 of 'messages': expected an object with 'role' and 'content'"),
        ("chat", {"messages": [{"role": "bot", "content": "a"}]}, "the role 'bot' is none of system, developer, user"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "the content of the user's message is 3, not text"),
        ("chat", {"messages": [{"role": "assistant", "content": ""}]}, "the content of the assistant's message is ''"),
        ("chat", {"messages": said("user", 1)}, "no message of the assistant in 'messages', so nothing to learn"),
        ("chat", {"messages": TURNS, "tools": "{"}, "the column 'tools' is not valid JSON"),
        ("chat", {"messages": TURNS, "tools": {"a": 1}}, "the column 'tools' holds .*, not a list of tools"),
        ("completion", {"prompt": "a"}, "no column 'completion'; there are prompt. Take one for it by data.rename="),
        ("completion", {"prompt": "", "completion": "b"}, "the column 'prompt' holds ''"),
        ("completion", {"prompt": "a", "completion": said("assistant", 1)}, "one is a text, the other messages"),
        ("completion", {"prompt": said("user", 1), "completion": said("user", 1)}, "is the user's, not the assistant"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "line 2: 'chosen' and 'rejected' are equal"),
        ("preference", {"prompt": "a", "chosen": "b"}, "there is no column 'rejected'; there are prompt, chosen"),
        ("preference", {"chosen": "b", "rejected": "c"}, "there is no column 'prompt', and no beginning"),
        ("preference", {"prompt": "a", "chosen": TURNS[2:3], "rejected": "c"}, "some are texts, others messages"),
    ],
)
def test_bad_rows_are_one_line(own: Callable[..., Recipe], task: str, row: dict[str, Any], error: str) -> None:
    good = {"messages": TURNS, "prompt": "w1", "completion": "w2", "chosen": "w3", "rejected": "w4"}
    with pytest.raises(DataError, match=error) as caught:
        tasks.make(own(task, [good, row]))
    assert "\n" not in str(caught.value)


def test_metrics_are_those_of_the_task(own: Callable[..., Recipe]) -> None:
    assert own("chat", []).metric == "loss"
    assert own("preference", []).metric == "accuracy"
    with pytest.raises(RecipeError, match="the task chat has the metric loss, not accuracy"):
        own("chat", [], metric="accuracy")


def test_what_is_cut_is_said_and_all_cut_is_refused(
    own: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"w{i} w1", "completion": " w5" * (2 + 9 * (i < 3))} for i in range(20)]
    rows[3]["prompt"] = " ".join(["w7"] * 30)
    task: Any = tasks.make(own("completion", rows, train={"max_length": 8}, data={"hold_out": 1, "split_seed": 3}))
    caplog.set_level("INFO", "isotune")
    kept = task.training_rows("train")
    said = caplog.text
    long = sum(d.completion.count("w5") > 2 for d in task.splits["train"])
    dropped = sum(len(d.prompt) > 50 for d in task.splits["train"])
    assert len(kept) == task.sizes["train"] - dropped
    assert long
    assert f"{long} of the train split are cut at train.max_length=8 tokens" in said
    assert ("left out" in said) == bool(dropped)
    with pytest.raises(DataError, match=r"no example of the train split fits into train\.max_length=4 tokens"):
        tasks.make(own("completion", rows, train={"max_length": 4})).encode()


def test_the_loss_is_that_of_the_learnt_tokens(own: Callable[..., Recipe]) -> None:
    rows = [{"messages": TURNS}, *chats(5)]
    files = {"train": "own.jsonl", "test": "own.jsonl"}
    task: Any = tasks.make(own("chat", rows, data={"files": files}))
    model = task.build()[0].eval()
    total, count = 0.0, 0
    for row in task.training_rows("train"):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    scores = task.score(task.predict(model))
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_several_test_sets_are_reported_by_name(own: Callable[..., Recipe]) -> None:
    files = {"train": "own.jsonl", "test": {"one": "own.jsonl", "two": "own.jsonl"}}
    task: Any = tasks.make(own("preference", pairs(3), data={"files": files}))
    margins = [1.0, 1.0, -1.0, 1.0, -1.0, -1.0]
    scores = task.score(margins)
    assert scores == pytest.approx(
        {
            "accuracy": 0.5,
            "one": 2 / 3,
            "two": 1 / 3,
            "margin": 0,
            "loss": (math.log1p(math.exp(-1)) + math.log1p(math.e)) / 2,
        }
    )


def test_prompts_may_be_implicit() -> None:
    read = Preference.dialogue
    start = said("user", 1)
    row = Row({"chosen": start + said("assistant", 2), "rejected": start + said("assistant", 3)}, "here")
    pair = read(None, row)  # type: ignore[arg-type]
    assert (pair.prompt, pair.chosen.completion, pair.rejected.completion) == (
        start,
        said("assistant", 2),
        said("assistant", 3),
    )


def test_margins_are_against_the_base_without_the_adapter(own: Callable[..., Recipe]) -> None:
    recipe = own("preference", pairs(6), data={"files": {"train": "own.jsonl", "test": "own.jsonl"}})
    task: Any = tasks.make(recipe)
    base = task.build()[0].eval()
    config = PsoftConfig(r=4, target_modules="all-linear", init_weights=False)
    adapted = get_peft_model(task.build()[0], config).eval()

    def likely(model: Any, prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
        return sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))

    expected = [
        0.1
        * sum(
            sign * (likely(adapted, row["prompt_ids"], row[name]) - likely(base, row["prompt_ids"], row[name]))
            for name, sign in (("chosen_ids", 1), ("rejected_ids", -1))
        )
        for row in task.training_rows("test")
    ]
    assert task.predict(adapted) == pytest.approx(expected, abs=1e-4)
    # The base is remembered where the adapter has been merged into it, and loaded where nothing is left of it.
    merged = adapted.merge_and_unload()
    assert task.predict(merged) == pytest.approx(expected, abs=1e-4)
    assert tasks.make(recipe).predict(merged) == pytest.approx(expected, abs=1e-4)


def test_answers_whose_first_token_differs_are_measured_from_the_second(own: Callable[..., Recipe]) -> None:
    """As TRL does: a token may reach from a short prompt into the answer, so that no token is the prompt's alone."""
    task: Any = tasks.make(own("preference", pairs(6)))
    model, sequences = task.build()[0].eval(), [[5, 6, 7], [8, 9, 10, 11]]
    with torch.no_grad():
        none, first = (
            {i: scores.tolist() for i, scores in task.log_likelihoods(model, sequences, [given, given], "")}
            for given in (0, 1)
        )
    assert none == first
    assert [len(none[i]) for i in range(2)] == [2, 3]


def test_the_reference_is_the_base_where_the_adapter_has_taken_from_it(own: Callable[..., Recipe]) -> None:
    task: Any = tasks.make(own("preference", pairs(4), data={"files": {"train": "own.jsonl", "test": "own.jsonl"}}))
    adapted = get_peft_model(task.build()[0], LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"))
    assert task.predict(adapted) == pytest.approx([0.0] * 4, abs=1e-4)  # as at the start of any training
    with adapted.disable_adapter():
        assert max(map(abs, task.predict(adapted))) > 0.01


def test_a_dry_run_counts_both_answers_of_a_pair(own: Callable[..., Recipe]) -> None:
    single = preview(plan(own("chat", chats(8), train={"batch_size": 4})))
    paired = preview(plan(own("preference", pairs(8), train={"batch_size": 2})))
    assert paired["methods"][0]["memory"] == single["methods"][0]["memory"]


@pytest.mark.slow
def test_preferences_are_trained_by_trl_against_the_base(
    own: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    step = tasks.preference.DpoLoop.training_step

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert set(self.model.peft_config) == {"default"}  # no copy of the adapter as a reference
        losses.append(float(step(self, *args, **kwargs)))
        return torch.tensor(losses[-1])

    monkeypatch.setattr(tasks.preference.DpoLoop, "training_step", seen)
    rows = pairs(14)
    recipe = own("preference", rows, train={"epochs": 4}, preference={"beta": 0.5})
    record = run(recipe)["runs"][0]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # a new adapter is the identity
    assert losses[-1] < 0.69
    points = [point for point in record["curve"] if "validation_loss" in point]
    best = next(point for point in points if point["step"] == record["best_step"])
    assert record["validation"]["loss"] == pytest.approx(best["validation_loss"], abs=1e-4)
    assert record["validation"]["accuracy"] == best["validation_rewards/accuracies"]
    assert record["kept_bytes"] > 0
    again = reload.score(Path(recipe.output or ""), "psoft")
    assert {how: found["changed"] for how, found in again.items()} == {"reloaded": 0, "merged": 0}
    adapter = Path(recipe.output or "") / "psoft" / "adapter"
    assert {file.name for file in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", ["chat", "preference"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    own: Callable[..., Recipe], tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(14) if task == "chat" else pairs(14)
    whole = run(own(task, rows, train={"epochs": 2}, output=str(tmp_path / "whole")))
    recipe = own(task, rows, train={"epochs": 2}, output=str(tmp_path / "parts"))
    step = loop.Loop.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    assert (tmp_path / "parts" / "psoft" / "checkpoint-3").is_dir()
    parts = run(recipe)
    assert parts["metrics"] == pytest.approx(whole["metrics"], abs=1e-5)
    assert parts["runs"][0]["validation"] == pytest.approx(whole["runs"][0]["validation"], abs=1e-5)
