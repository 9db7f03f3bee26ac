"""The paper's figures, found by our names of tasks and methods."""

from __future__ import annotations

import pytest

from isotune.report.paper import figures, results, source


def test_a_figure_is_found_by_task_and_method() -> None:
    found = figures("glue/cola")
    assert found["psoft"].score == pytest.approx(0.7042)
    assert (found["psoft"].method, found["psoft"].model, found["psoft"].parameters) == (
        "PSOFT r=46",
        "DeBERTaV3-base",
        0.08,
    )
    assert found["full"].method == "FFT"
    assert "hra" not in found
    assert figures("glue/stsb")["lora"].score == pytest.approx(0.916)
    assert "goft" not in figures("glue/stsb")  # the paper's table has a dash there
    assert figures("commonsense/arc_e")["psoft"] == figures("commonsense/arc_easy")["psoft"]
    assert figures("demo") == figures("glue/mnli") == figures("nowhere/cola") == {}


def test_every_result_of_the_paper_can_be_reached() -> None:
    """35 tasks, and of every row that has a figure the method's name is known."""
    tasks = {
        f"{suite}/{key}"
        for suite, rows in results()["results"].items()
        for row in rows
        for key in row
        if key not in ("method", "params_M", "memory_GB", "avg")
    }
    assert len(tasks) == 35
    for task in tasks:
        suite, _, name = task.partition("/")
        given = {row["method"]: row[name] / 100 for row in results()["results"][suite] if row[name] is not None}
        assert {f.method: f.score for f in figures(task).values()} == given
    assert "2505.11235" in source()
