"""The paper's figures, found by our names of tasks and methods."""

from __future__ import annotations

import pytest

from isotune.experiments.loading import packaged
from isotune.experiments.paper import MODELS, figures, results, source


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
    assert figures("commonsense/all")["psoft"].score == pytest.approx(0.8254)
    assert figures("demo") == figures("glue/mnli") == figures("nowhere/cola") == {}


def test_every_recipe_of_the_papers_suites_finds_its_figures() -> None:
    own = [name for name in packaged() if name.partition("/")[0] in MODELS]
    beyond = {"glue/mnli", "glue/qqp", "math/all"}
    assert len([name for name in own if not name.endswith("/all")]) == 35 + 2
    assert {name for name in own if not figures(name)} == beyond


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
