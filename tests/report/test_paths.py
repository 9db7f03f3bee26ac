"""What was forgotten on the way to a score, from made-up courses whose answers can be read off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comparisons import METHODS, write_comparison
from isotune.report.figures import Looks
from isotune.report.figures.forgetting import forgetting
from isotune.report.figures.looks import Figure
from isotune.report.paths import at_one_score, at_one_score_by_rate, mean_path
from isotune.report.results import Comparison, read

TWO = {label: METHODS[label] for label in ("psoft:r=46", "lora:r=8")}
LORA = [(0.6, 0.1), (0.8, 0.3), (0.9, 0.4)]
PSOFT = [(0.55, 0.02), (0.7, 0.08), (0.75, 0.12)]


def compared(
    folder: Path, metric: str = "accuracy", apart: float = 0.01, **courses: list[tuple[float, float]]
) -> Comparison:
    """The courses of the first seed; each further one has forgotten `apart` more at every point."""
    place = write_comparison(folder, methods=TWO, metric=metric)
    for label, course in courses.items():
        for path in (place / "runs" / {"psoft": "psoft_r=46", "lora": "lora_r=8"}[label]).iterdir():
            record = json.loads(path.read_text())
            more = apart * record["seed"]
            curve = [
                {"step": 10 * i, f"validation_{metric}": score, "forgetting": forgotten + more}
                for i, (score, forgotten) in enumerate(course, 1)
            ]
            about = {"change": course[-1][1], "unit": "cosine distance", "apart": 0.6, "measure": "distance"}
            untrained = {metric: 0.5 if metric == "accuracy" else 2.0}
            path.write_text(json.dumps({**record, "curve": curve, "untrained": untrained, "forgetting": about}))
    return read(place)


def drawn(comparison: Comparison, key: str) -> Figure:
    """One of the section's plots."""
    section = forgetting(comparison, Looks([comparison]))
    assert section is not None
    return next(figure for figure in section.figures if figure.key == key)


def test_methods_are_set_side_by_side_at_the_best_score_that_all_reach(tmp_path: Path) -> None:
    comparison = compared(tmp_path, lora=LORA, psoft=PSOFT)
    found = at_one_score(comparison)
    assert found is not None
    assert found.level == 0.75
    # LoRA is there three quarters of the way from its first point to its second.
    assert found.forgotten["lora:r=8"] == pytest.approx([0.25, 0.26, 0.27])
    assert found.forgotten["psoft:r=46"] == pytest.approx([0.12, 0.13, 0.14])
    assert found.mean("lora:r=8") == pytest.approx(0.26)
    assert found.error("lora:r=8") == pytest.approx(0.01 / 3**0.5)
    means = [(0.5, 0.0), *((score, forgotten + 0.01) for score, forgotten in LORA)]
    for point, expected in zip(mean_path(comparison.variants[1], "accuracy"), means, strict=True):
        assert point == pytest.approx(expected)


def test_a_score_before_the_first_measurement_is_on_the_line_from_the_untrained_model(tmp_path: Path) -> None:
    found = at_one_score(compared(tmp_path, lora=LORA, psoft=[(0.52, 0.01), (0.55, 0.02), (0.54, 0.09)]))
    assert found is not None
    assert found.level == 0.55
    assert found.forgotten["lora:r=8"][0] == pytest.approx(0.05)
    assert found.forgotten["psoft:r=46"][0] == pytest.approx(0.02)  # when it was first there, not at the end


def test_a_loss_falls(tmp_path: Path) -> None:
    courses = {"lora": [(1.5, 0.1), (1.0, 0.3)], "psoft": [(1.6, 0.1), (1.25, 0.2)]}
    found = at_one_score(compared(tmp_path, "loss", **courses))
    assert found is not None
    assert found.level == 1.25
    assert found.forgotten["lora:r=8"][0] == pytest.approx(0.2)


def test_without_courses_or_without_a_gain_nothing_is_said(tmp_path: Path) -> None:
    assert at_one_score(read(write_comparison(tmp_path / "none", methods=TWO))) is None
    assert at_one_score(compared(tmp_path / "one", lora=LORA)) is None
    assert at_one_score(compared(tmp_path / "flat", lora=LORA, psoft=[(0.5, 0.1), (0.4, 0.2)])) is None


def test_the_report_shows_the_courses_and_what_a_distance_means(tmp_path: Path) -> None:
    comparison = compared(tmp_path, lora=LORA, psoft=PSOFT)
    section = forgetting(comparison, Looks([comparison]))
    assert section is not None
    assert "lie 0.60 apart in the base model, and 0.3 is 50% of that" in section.text
    course = drawn(comparison, "course")
    assert "accuracy 0.750, they had forgotten: PSOFT r=46 0.130 ± 0.006, LoRA r=8 0.260 ± 0.006." in course.caption
    assert [len(trace["x"]) for trace in course.data] == [4, 4]


def test_a_seed_that_does_not_reach_the_score_is_told(tmp_path: Path) -> None:
    compared(tmp_path, lora=LORA, psoft=PSOFT)
    path = next((tmp_path / "runs" / "lora_r=8").glob("lr=0.001-seed=2.json"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "curve": [{**p, "validation_accuracy": 0.6} for p in record["curve"]]}))
    assert "LoRA r=8 0.255 ± 0.005 (2 of 3 seeds reach it)" in drawn(read(tmp_path), "course").caption


def test_a_model_that_does_not_change_has_no_course(tmp_path: Path) -> None:
    """As under a head alone, but for rounding."""
    comparison = compared(tmp_path, apart=0.0, lora=LORA, psoft=[(0.6, 1e-8), (0.7, 7e-9)])
    assert at_one_score(comparison) is None


RATES = (4e-4, 1e-3, 2.5e-3)


def searched(folder: Path, **ends: list[tuple[float, float]]) -> Comparison:
    """Trainings that end, at each of three rates, at a score on validation and what was forgotten."""
    place = write_comparison(folder, methods=TWO, rates=RATES)
    for label, points in ends.items():
        for rate, (score, forgotten) in zip(RATES, points, strict=True):
            path = place / "runs" / {"psoft": "psoft_r=46", "lora": "lora_r=8"}[label] / f"lr={rate:g}-seed=0.json"
            record = json.loads(path.read_text())
            more = {"forgetting": {"change": forgotten, "measure": "distance"}, "untrained": {"accuracy": 0.5}}
            path.write_text(json.dumps({**record, "validation": {"accuracy": score}, **more}))
    return read(place)


def test_rates_are_set_side_by_side_at_the_best_score_that_all_reach(tmp_path: Path) -> None:
    comparison = searched(tmp_path, lora=LORA, psoft=[(0.7, 0.2), (0.8, 0.35), (0.75, 0.6)])
    found = at_one_score_by_rate(comparison)
    assert found is not None
    assert found.level == 0.8
    assert found.forgotten["lora:r=8"] == pytest.approx([0.3])
    assert found.forgotten["psoft:r=46"] == pytest.approx([0.35])  # at its best rate, not at the highest
    trade = drawn(comparison, "trade")
    assert "accuracy 0.800, they had forgotten: LoRA r=8 0.300, PSOFT r=46 0.350." in trade.caption
    psoft = next(trace for trace in trade.data if trace["meta"] == "PSOFT r=46")
    assert list(zip(psoft["x"], psoft["y"], strict=True)) == [(0.0, 0.5), (0.2, 0.7), (0.35, 0.8), (0.6, 0.75)]
    assert psoft["marker"]["size"] == [7, 7, 11, 7]
    assert [text.count("rate") for text in psoft["hovertemplate"]] == [0, 1, 1, 1]
    assert trade.layout["yaxis"]["range"] == pytest.approx([0.74, 0.916])
    assert trade.layout["xaxis"]["range"] == pytest.approx([0.0, 0.46])


def test_one_rate_is_no_way(tmp_path: Path) -> None:
    comparison = searched(tmp_path, lora=LORA)
    assert at_one_score_by_rate(comparison) is None
    section = forgetting(comparison, Looks([comparison]))
    assert section is not None
    assert [figure.key for figure in section.figures] == ["forgetting"]
