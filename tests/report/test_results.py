"""A comparison's folder, read: figures from the run records alone, gaps told, damage refused."""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparisons import METHODS, write_comparison
from isotune.experiments.outcome import at_border
from isotune.report.columns import columns_of, duration, pareto, size
from isotune.report.figures import Looks, sections
from isotune.report.page import render
from isotune.report.results import read
from isotune.report.table import comma_separated, latex, markdown

FEW = {label: METHODS[label] for label in ("psoft:r=46", "psoft_so:r=46", "lora:r=8", "head")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "few", methods=FEW)


def change(path: Path, **values: Any) -> None:
    """Write other values into a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_figures_are_those_of_the_runs_at_the_chosen_rate(folder: Path) -> None:
    found = read(folder)
    assert [variant.title for variant in found.variants] == ["PSOFT r=46", "PSOFT-SO r=46", "LoRA r=8", "head only"]
    psoft = found.variants[0]
    names = ("lr=0.001-seed=0", "lr=0.001-seed=1", "lr=0.001-seed=2")
    records = [json.loads((folder / "runs" / "psoft_r=46" / f"{name}.json").read_text()) for name in names]
    assert [record["phase"] for record in records] == ["search", "seed", "seed"]
    scores = [record["test"]["accuracy"] for record in records]
    assert psoft.scores == scores
    assert psoft.mean == pytest.approx(sum(scores) / 3)
    assert psoft.standard_error == pytest.approx(statistics.stdev(scores) / math.sqrt(3))
    assert psoft.average("train_seconds") == pytest.approx(sum(r["train_seconds"] for r in records) / 3)
    assert [run.lr for run in psoft.search] == [4e-4, 1e-3, 2.5e-3]
    assert not psoft.rate_at_border
    assert found.best is not None
    assert found.best.title == "LoRA r=8"
    assert not found.notes


def test_within_one_standard_error_is_the_bests_own(folder: Path) -> None:
    place = folder / "runs"
    for label, scores in {"lora_r=8": (0.80, 0.82, 0.84), "psoft_r=46": (0.81, 0.81, 0.81), "head": (0.8,) * 3}.items():
        for seed, score in enumerate(scores):
            change(place / label / f"lr=0.001-seed={seed}.json", test={"accuracy": score})
    found = read(folder)
    # The best: mean 0.82 with a standard error of 0.0115.
    assert [found.near_best(variant) for variant in found.variants] == [True, False, False, False]
    for seed in (1, 2):
        (place / "lora_r=8" / f"lr=0.001-seed={seed}.json").unlink()
        change(place / "lora_r=8" / "lr=0.001-seed=0.json", test={"accuracy": 0.82})
    found = read(folder)
    assert found.best is not None
    assert (found.best.title, found.best.standard_error) == ("LoRA r=8", None)
    assert not any(found.near_best(variant) for variant in found.variants)
    assert "Of 3 seeds there are fewer: LoRA r=8 1." in found.notes


def test_a_loss_is_best_where_it_is_lowest(folder: Path) -> None:
    change(folder / "comparison.json", higher_is_better=False)
    found = read(folder)
    assert found.best is not None
    assert found.best.title == "head only"


def test_old_and_partial_records_are_read_and_gaps_told(folder: Path) -> None:
    optional = ("interval", "curve", "peak_memory_bytes", "kept_bytes", "forgetting", "geometry", "adapter_parameters")
    for path in (folder / "runs").rglob("*.json"):
        change(path, **dict.fromkeys(optional))
    keys = [column.key for column in columns_of(read(folder), details=True)]
    assert keys == ["trainable_parameters", "adapter_bytes", "train_seconds", "tokens_per_second"]
    # Stopped before the first run of a method was over, and another has failed for good.
    for path in (folder / "runs" / "head").iterdir():
        path.unlink()
    for path in (folder / "runs" / "psoft_so_r=46").iterdir():
        change(path, failed="the loss is NaN at step 3", test=None, validation=None)
    found = read(folder)
    assert list(found.notes) == ["PSOFT-SO r=46 failed: the loss is NaN at step 3", "Not run yet: head only."]
    assert [variant.mean is None for variant in found.variants] == [False, True, False, True]
    # And without comparison.json, from the runs alone, the rate by validation.
    before = found.variants[0].scores
    (folder / "comparison.json").unlink()
    found = read(folder)
    psoft = next(variant for variant in found.variants if variant.name == "psoft")
    assert (psoft.lr, psoft.scores) == (1e-3, before)
    assert found.recipe == "demo"
    assert any("comparison.json is not there" in note for note in found.notes)


def test_a_rate_at_the_border_is_known(folder: Path) -> None:
    content = json.loads((folder / "comparison.json").read_text())
    content["rows"][0]["lr"] = 2.5e-3
    change(folder / "comparison.json", rows=content["rows"])
    psoft = read(folder).variants[0]
    assert psoft.rate_at_border
    assert len(psoft.scores) == 1


def test_several_test_sets_and_a_rate_chosen_by_the_loss(folder: Path) -> None:
    content = json.loads((folder / "comparison.json").read_text())
    change(folder / "comparison.json", recipe="commonsense/all", data={"sets": {"boolq": 10, "piqa": 10}}, rows=None)
    for path in (folder / "runs").rglob("*.json"):
        record = json.loads(path.read_text())
        test = {"accuracy": 0.7, "boolq": 0.6, "piqa": 0.8, "other": 1.0}
        change(path, test=test, validation={"loss": 1 + abs(math.log(record["lr"] / 2.5e-3))})
    found = read(folder)
    assert content["rows"][0]["lr"] == 1e-3
    assert (found.chosen_by, found.variants[0].lr) == ("loss", 2.5e-3)
    parts = [column for column in columns_of(found) if column.key.startswith("test_")]
    assert [(column.title, column.value(found.variants[0])) for column in parts] == [("boolq", 0.6), ("piqa", 0.8)]
    assert found.paper_of_part("boolq")["psoft"].score == pytest.approx(0.7217)


def test_damage_is_one_error_that_names_the_file(folder: Path, tmp_path: Path) -> None:
    path = folder / "runs" / "head" / "lr=0.001-seed=1.json"
    good = path.read_text()
    for text, said in (
        (good[:100], "cannot read.*; remove it, and the same command trains that run again"),
        ("[1]", "should hold an object; remove it"),
        ('{"a": NaN}', "it holds no run, as it names no method; remove it"),
        ("{}", "it holds no run"),
        (good.replace('"seed": 1', '"seed": "one"'), "seed should be a number"),
        (json.dumps({**json.loads(good), "test": 0.5}), "test should be an object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said) as caught:
            read(folder)
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="there are some below it") as caught:
        read(tmp_path)
    assert str(folder) in str(caught.value)
    with pytest.raises(ValueError, match="isotune compare"):
        read(folder / "runs" / "head")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seeds": [{}]}, "seeds.0 should be a number"),
    ({"seeds": [[]]}, "seeds.0 should be a number"),
    ({"seeds": ["x"]}, "seeds.0 should be a number"),
    ({"seeds": 1}, "seeds should be a list"),
    ({"variants": [1]}, "variants.0 should be text"),
    ({"rows": ["x"]}, "rows.0 should be an object"),
    ({"rows": [{"label": "head", "lr": "", "failed": None}]}, "rows.0.lr should be a number"),
    ({"rows": [{"label": "head", "lr": {"a": 1}}]}, "rows.0.lr should be a number"),
    ({"rows": [{"label": "head", "lr": -1e-3}]}, "rows.0.lr should be a number above 0"),
    ({"rows": [{"label": {}}]}, "rows.0.label should be text"),
    ({"match_params": 10**400}, "match_params should be a number"),
    ({"recipe": []}, "recipe should be text"),
    ({"data": 1}, "data should be an object"),
    ({"higher_is_better": {}}, "higher_is_better should be true or false"),
]
WRONG_RUN: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1.5}, "seed should be a number"),
    ({"seed": 10**400}, "seed should be a number"),
    ({"seed": True}, "seed should be a number"),
    ({"lr": 0}, "lr should be a number above 0"),
    ({"train_seconds": 10**400}, "train_seconds should be a number"),
    ({"trainable_parameters": "many"}, "trainable_parameters should be a number"),
    ({"tokens_per_second": []}, "tokens_per_second should be a number"),
    ({"validation": 1}, "validation should be an object"),
    ({"interval": {"low": "x"}}, "interval.low should be a number"),
    ({"curve": {}}, "curve should be a list"),
    ({"forgetting": {"change": []}}, "forgetting.change should be a number"),
    ({"geometry": {"format": 1, "layers": [1]}}, "geometry.layers.0 should be an object"),
    ({"geometry": {"format": 1, "layers": [{}]}}, "geometry.layers.0.module should be there"),
    ({"versions": []}, "versions should be an object"),
]


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        *(("comparison.json", *case) for case in WRONG),
        *(("runs/head/lr=0.001-seed=1.json", *case) for case in WRONG_RUN),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line_that_names_the_file(
    folder: Path, name: str, changed: dict[str, Any], said: str
) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=f"cannot read .*{said}") as caught:
        read(folder)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to every value in some JSON, of a list to the first two."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in items:
        yield (*above, key)
        yield from places(one, (*above, key))


ODD = (None, True, -1, 0, 1e308, 10**400, math.nan, "x", "", [], {}, [[]], {"a": 1}, "\x1b[2J\n", [1], [None])


@pytest.mark.parametrize("name", ["comparison.json", "runs/psoft_r=46/lr=0.001-seed=0.json"])
def test_any_value_in_the_place_of_another_is_refused_or_shown(folder: Path, name: str) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    cases = [(place, value) for place in places(content) for value in ODD]
    for place, value in random.Random(0).sample(cases, 20):
        changed = copy.deepcopy(content)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        path.write_text(json.dumps(changed))
        said = ""
        try:
            found = read(folder)
        except ValueError as error:
            said = str(error)
        if said:
            assert str(path) in said, (place, value)
            assert len(said.splitlines()) == 1
            continue
        for written in (markdown([found]), latex([found]), comma_separated([found])):
            assert all(line.isprintable() for line in written.split("\n"))
        json.dumps([[f.data, f.layout] for s in sections(found, Looks([found])) for f in s.figures], allow_nan=False)


def test_odd_numbers_are_left_out_or_drawn(folder: Path) -> None:
    pytest.importorskip("plotly")
    head = folder / "runs" / "head" / "lr=0.001-seed=0.json"
    change(head, train_seconds=1e90, trainable_parameters=10**90, method={"name": "psoft", "r": 10**400})
    curve = [{"step": 10**400, "loss": 1.0}, {"step": 1, "loss": "x"}, {"step": 2, "loss": 10**400}]
    change(head, curve=curve, test={"accuracy": 0.5, "loss": 10**400})
    psoft = folder / "runs" / "psoft_so_r=46" / "lr=0.001-seed=0.json"
    change(psoft, method={"name": "psoft", "r": 46, "psoft_mag_a": [], "psoft_mag_b": {}})
    text = psoft.read_text().replace('"kept_bytes": ', '"kept_bytes": NaN, "was": ')
    psoft.write_text(text)
    page = render([read(folder)])
    assert "NaN" not in page.rpartition("<script")[2]
    assert read(folder).variants[3].average("train_seconds") > 1e80


def test_the_result_of_a_training_is_reported_too(tmp_path: Path, folder: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted((folder / "runs").rglob("*seed=0.json"))]
    old = [{k: v for k, v in run.items() if k not in ("label", "phase", "seed", "metric", "data")} for run in runs]
    known = {"recipe": {"task": "text-classification", "model": "m"}, "metric": "accuracy", "seed": 0, "data": {}}
    results = []
    for name, entries in (("new", runs), ("old", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({**known, "runs": entries}))
        results.append(read(tmp_path / name))
    assert [len(result.variants) for result in results] == [4, 4]
    first, second = (sorted(v.mean or 0 for v in result.variants) for result in results)
    assert first == second
    assert not results[0].notes


def test_of_equally_good_rates_no_file_name_decides(tmp_path: Path) -> None:
    """Without a stored row; 4e-05 is the lowest rate, and the last by name."""
    place = write_comparison(tmp_path, methods={"psoft:r=46": METHODS["psoft:r=46"]}, rates=(4e-5, 1e-4, 2.5e-4))
    for path in (place / "runs" / "psoft_r=46").iterdir():
        change(path, validation={"accuracy": 0.5 if "0.0001" in path.name else 0.6})
    (place / "comparison.json").unlink()
    assert read(place).variants[0].lr == 4e-5


BORDER = [
    ((1e-3,), False),
    ((1e-3, 2e-3), False),
    ((5e-4, 1e-3, 2e-3), False),
    ((1e-3, 2e-3, 4e-3), True),
    ((1e-4, 5e-4, 1e-3), True),
]


@pytest.mark.parametrize(("tried", "border"), BORDER)
def test_command_and_report_agree_on_the_border(tmp_path: Path, tried: tuple[float, ...], border: bool) -> None:
    assert at_border(1e-3, tried) is border
    methods = {"psoft:r=46": METHODS["psoft:r=46"]}
    place = write_comparison(tmp_path, methods=methods, rates=tried)
    content = json.loads((place / "comparison.json").read_text())
    change(place / "comparison.json", rows=[{**content["rows"][0], "lr": 1e-3}])
    (found,) = read(place).variants
    assert found.row()["lr_at_border"] is found.rate_at_border is border


def test_titles_tell_variants_apart(tmp_path: Path) -> None:
    base = METHODS["psoft:r=46"]
    labels = ("psoft:r=8", "psoft:r=8+psoft_mag_a=false", "psoft:r=8+psoft_orth=false", "hra", "head", "head:lr=0.01")
    content = {"variants": list(labels), "metric": "accuracy", "rows": []}
    write_comparison(tmp_path, methods=dict.fromkeys(labels[:-1], base))
    change(tmp_path / "comparison.json", **content)
    titles = [variant.title for variant in read(tmp_path).variants]
    assert titles == ["PSOFT r=8", "PSOFT r=8 no α", "PSOFT r=8 free R", "HRA", "head", "head lr=0.01"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12), st.booleans())
def test_the_front_holds_what_no_other_point_beats(points: list[tuple[int, int]], higher: bool) -> None:
    given_points = [(float(cost), float(score), i) for i, (cost, score) in enumerate(points)]
    front = pareto(given_points, higher_is_better=higher)
    sign = 1 if higher else -1

    def beats(a: Any, b: Any) -> bool:
        return a[0] <= b[0] and sign * a[1] >= sign * b[1] and a[:2] != b[:2]

    expected = {p[:2] for p in given_points if not any(beats(q, p) for q in given_points)}
    assert {p[:2] for p in front} == expected
    assert len(front) == len(expected)
    assert [p[0] for p in front] == sorted(p[0] for p in front)


def test_sizes_and_durations_are_short() -> None:
    assert [size(v) for v in (0, 950, 1024, 340_000, 1.5e9, 3e12)] == [
        "0 B",
        "950 B",
        "1 KiB",
        "332 KiB",
        "1.4 GiB",
        "2,794 GiB",
    ]
    assert [duration(v) for v in (3.21, 42, 200, 4000, 7000, 400_000)] == [
        "3.2 s",
        "42 s",
        "3.3 min",
        "67 min",
        "1.9 h",
        "111 h",
    ]
