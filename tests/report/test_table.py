"""The table alone, in each format, and the command that writes it."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import isotune_cli as cli
from comparisons import METHODS, write_comparison
from isotune.report.finding import finding
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
    found = finding(comparison)
    assert found is not None
    assert lines[4] == f"{found.sentence} {found.basis}"


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
    assert text.startswith("% CoLA, is this sentence acceptable English?\n% 3 methods on all-MiniLM-L6-v2, 3 seeds")


BREAKS = "\n\r\x0b\x0c\x1c\x85\u2028\u2029"


def named(folder: Path, name: str) -> Path:
    """Give everything in a comparison that is a name this one."""
    for path in [folder / "comparison.json", *(folder / "runs").rglob("*.json")]:
        content = json.loads(path.read_text())
        method = {"name": name, "r": name, name: 1}
        path.write_text(json.dumps({**content, "recipe": name, "model": name, "failed": name, "method": method}))
    return folder


@pytest.mark.parametrize("mark", BREAKS)
def test_a_line_break_in_a_name_ends_no_comment_of_latex(folder: Path, mark: str) -> None:
    text = latex([read(named(folder, f"x{mark}\\input{{/etc/passwd}}{mark}[1em]\x01*"))])
    assert not [line for line in text.splitlines() if line.startswith("\\input")]
    assert "\\input" not in "".join(line for line in text.splitlines() if not line.startswith("%"))
    outside = "".join(line for line in text.splitlines() if not line.startswith("%"))
    assert outside.count("{") == outside.count("}")
    table = markdown([read(folder)])
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_a_row_of_latex_is_no_option_of_the_row_before(folder: Path) -> None:
    content = json.loads((folder / "comparison.json").read_text())
    rows = [{**row, "method": {"name": "[x]"}} for row in content["rows"]]
    (folder / "comparison.json").write_text(json.dumps({**content, "rows": rows}))
    for path in (folder / "runs").rglob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "method": {"name": "[x]"}}))
    assert not [line for line in latex([read(folder)]).splitlines() if line.startswith(("[", "*"))]


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t=", " =", "＝", "\r@"])
def test_no_cell_of_csv_is_a_formula(folder: Path, begin: str) -> None:
    rows = list(csv.reader(io.StringIO(comma_separated([read(named(folder, f"{begin}cmd|' /C calc'!A0"))]))))
    names = [cell for row in rows for cell in row if "cmd" in cell]
    assert names
    assert not [cell for cell in names if cell.lstrip()[0] in "=+-@＝"]
    assert all(len(row) == len(rows[0]) for row in rows)


def test_html_in_a_name_is_text_in_markdown(folder: Path) -> None:
    assert "<script" not in markdown([read(named(folder, "<script>alert(1)</script>"))])


def test_the_command_writes_each_format(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    for form, begins in (("md", "## CoLA, is"), ("csv", "comparison,model"), ("latex", "% CoLA, is")):
        done = run(cli.app, ["report", str(folder), "--format", form])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith(begins)
        path = tmp_path / "new" / form
        assert run(cli.app, ["report", str(folder), "--format", form, "-o", str(path)]).exit_code == 0
        assert path.read_text() == done.stdout
    done = run(cli.app, ["report", str(folder), "--format", "pdf"])
    assert (done.exit_code, "html, md, csv, latex" in done.output) == (2, True)
    done = run(cli.app, ["report", str(tmp_path / "new")])
    assert (done.exit_code, "isotune compare" in done.output) == (2, True)


def test_a_method_is_set_against_lora_example_by_example(tmp_path: Path) -> None:
    """Of 100 examples LoRA has 60 right in each seed, PSOFT those and 10 more; HRA's answers were not kept."""
    place = write_comparison(tmp_path, methods=FEW)
    for label, hits in (("psoft_r=46", 70), ("lora_r=8", 60)):
        for path in (place / "runs" / label).iterdir():
            right = " ".join(["1"] * hits + ["0"] * (100 - hits))
            answers = {"predictions": right, "references": " ".join(["1"] * 100)}
            path.write_text(json.dumps({**json.loads(path.read_text()), "answers": answers}))
    comparison = read(place)
    head, _, *rows = (line.strip("| ").split(" | ") for line in markdown([comparison]).splitlines() if line[0:1] == "|")
    column = head.index("Difference to LoRA r=8")
    shown = {row[0]: row[column] for row in rows}
    assert shown["LoRA r=8"] == shown["HRA r=8"] == "–"
    assert re.fullmatch(r"\+10\.0 points \(\+\d+\.\d to \+\d+\.\d\)", shown["PSOFT r=46"])  # of percent, no percent
    (record,) = [row for row in csv.DictReader(io.StringIO(comma_separated([comparison]))) if row["method"] == "psoft"]
    assert float(record["difference"]) == pytest.approx(0.1)
