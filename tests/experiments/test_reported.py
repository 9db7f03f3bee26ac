"""What a comparison records is what its report reads: a real one, trained here, from the first run to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isotune.experiments.compare import Options, plan
from isotune.experiments.execute import execute
from isotune.experiments.files import write_json
from isotune.experiments.recipe import validate
from isotune.report.columns import COLUMNS, columns_of
from isotune.report.figures import Looks, sections
from isotune.report.page import render
from isotune.report.paths import path_of
from isotune.report.results import read
from isotune.report.table import markdown

pytest.importorskip("plotly")


@pytest.mark.slow
def test_a_comparison_is_reported_with_all_that_it_recorded(tiny: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    tiny["train"]["max_steps"] = 6
    methods = ("psoft_so:r=4", "psoft:r=4", "lora:r=2")
    found = plan(
        "tiny", validate(tiny), Options(methods=methods, seeds=2, lr_search=2, command="isotune compare x"), folder
    )
    while ready := list(found.ready()):
        for spec in ready:
            found.add_record(spec, execute(spec))
    write_json(folder / "comparison.json", found.result())

    comparison = read(folder)
    assert list(comparison.notes) == []
    for variant, row in zip(comparison.variants, found.result()["rows"], strict=True):
        # The table of the terminal and the report come to the same figures, each from the records.
        assert (variant.mean, variant.lr) == (row["mean"], row["lr"])
        assert variant.standard_error == pytest.approx(row["standard_error"])
        assert variant.average("train_seconds") == pytest.approx(row["train_seconds"])
        assert all(run.interval and run.curve and run.forgetting is not None for run in variant.runs)
        # What was forgotten is measured beside each score, and at the last one as at the end.
        assert all(path_of(run, "accuracy")[-1][1] == pytest.approx(run.forgetting, abs=1e-6) for run in variant.runs)
        assert len(variant.search) == 2
    keys = {column.key for column in columns_of(comparison, details=True)}
    assert keys == {"difference", *(column.key for column in COLUMNS)}
    apart = {row["label"]: row["difference"] and row["difference"]["mean"] for row in found.result()["rows"]}
    means = {variant.label: variant.mean or 0.0 for variant in comparison.variants}
    assert apart == {
        label: None if label == "lora:r=2" else pytest.approx(means[label] - means["lora:r=2"]) for label in apart
    }
    strict, relaxed, lora = (variant.geometry for variant in comparison.variants)
    assert strict is not None
    assert relaxed is not None
    assert (strict.strict, relaxed.strict, lora) == (True, False, None)
    shown = {section.key: section for section in sections(comparison, Looks([comparison]))}
    assert set(shown) == {"quality", "costs", "forgetting", "curves", "rates", "vectors", "geometry"}
    assert len([figure for figure in shown["geometry"].figures if figure.key.startswith("map")]) == 6
    page = render([comparison])
    for variant in comparison.variants:
        assert variant.title in page
        assert comparison.shown(variant.mean) in markdown([comparison])
    assert "isotune compare x" in page
