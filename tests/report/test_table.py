"""The table alone, in each format, and the command that writes it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comparisons import METHODS, write_comparison
from isotune import cli
from isotune.report.results import read
from isotune.report.table import comma_separated, latex, markdown

FEW = {label: METHODS[label] for label in ("psoft:r=46", "hra:r=8", "lora:r=8")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "cola", recipe="glue/cola", metric="matthews_correlation", methods=FEW)


def test_csv_holds_the_plain_numbers(folder: Path, tmp_path: Path) -> None:
    second = write_comparison(tmp_path / "demo", methods={"head": METHODS["head"]})
    comparison = read(folder)
    rows = list(csv.DictReader(io.StringIO(comma_separated([comparison, read(second)]))))
    assert [row["label"] for row in rows] == [*FEW, "head"]
    for row, variant in zip(rows, comparison.variants, strict=False):
        assert float(row["mean"]) == variant.mean
        assert float(row["standard_error"]) == variant.standard_error
        assert float(row["peak_memory_bytes"]) == variant.average("peak_memory_bytes")
        assert float(row["adapter_parameters"]) == FEW[row["label"]]["parameters"]
    assert [row["best"] for row in rows] == ["0", "0", "1", "1"]
    assert (rows[0]["paper_score"], rows[0]["paper_method"], rows[0]["paper_model"]) == (
        "0.7042",
        "PSOFT r=46",
        "DeBERTaV3-base",
    )
    assert rows[1]["paper_score"] == rows[3]["paper_score"] == rows[3]["forgetting"] == ""


def test_markdown_is_best_first_and_keeps_the_papers_figure_apart(folder: Path) -> None:
    comparison = read(folder)
    lines = markdown([comparison]).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in table[2:]] == ["LoRA r=8", "HRA r=8", "PSOFT r=46"]
    assert table[0][3] == "Paper (DeBERTaV3-base)"
    assert [row[3] for row in table[2:]] == ["0.680 (LoRA r=8)", "–", "0.704 (PSOFT r=46)"]
    lora = comparison.variants[2]
    assert table[2][1] == f"**{lora.mean:.3f} ± {lora.standard_error:.3f}**"
    assert len({len(row) for row in table}) == 1
    assert "not results of ours" in lines[-1]


def test_latex_escapes_what_it_must(folder: Path) -> None:
    content = json.loads((folder / "comparison.json").read_text())
    content["rows"][0]["failed"] = "at 100 % of_steps"
    (folder / "comparison.json").write_text(json.dumps(content))
    text = latex([read(folder)])
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len({line.count("&") for line in body}) == 1
    assert "\\textbf{" in body[1]
    assert "$\\pm$" in body[1]
    assert "±" not in "".join(body)
    assert text.count("{") == text.count("}")
    assert text.startswith("% glue/cola")


def test_the_command_writes_each_format(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    for form, begins in (("md", "## glue/cola"), ("csv", "comparison,model"), ("latex", "% glue/cola")):
        done = run(cli.app, ["report", str(folder), "--format", form])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith(begins)
        path = tmp_path / "new" / form
        assert run(cli.app, ["report", str(folder), "--format", form, "-o", str(path)]).exit_code == 0
        assert path.read_text() == done.stdout
    done = run(cli.app, ["report", str(folder), "--format", "pdf"])
    assert (done.exit_code, "html, md, csv, latex" in done.output) == (2, True)
    done = run(cli.app, ["report", str(tmp_path)])
    assert (done.exit_code, "isotune compare" in done.output) == (2, True)
