"""The table alone: as Markdown, as CSV for a program, as LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from isotune.experiments.text import printable
from isotune.report.columns import columns_of, table_of
from isotune.report.finding import finding
from isotune.report.results import Comparison
from isotune.report.titles import summary, titles


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table a comparison: the best in bold, ≈ before those within one standard error of it."""
    parts = []
    for comparison, title in zip(comparisons, titles(comparisons), strict=True):
        plain = _cells(comparison, "\x01{}\x01", "≈ {}")
        head, *body = [[_markdown(cell).replace("\x01", "**") for cell in row] for row in plain]
        rule = ["---", *["---:"] * (len(head) - 1)]
        table = "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
        above = [f"## {_markdown(title)}", *map(_markdown, _above(comparison))]
        parts.append("\n\n".join([*above, table, *map(_markdown, _remarks(comparison))]))
    return "\n\n".join(parts) + "\n"


def latex(comparisons: Sequence[Comparison]) -> str:
    """A `tabular` a comparison, for the package booktabs: the best in bold, those within one standard error italic."""
    parts = []
    for comparison, title in zip(comparisons, titles(comparisons), strict=True):
        plain = _cells(comparison, "\x01{}\x03", "\x02{}\x03")
        head, *body = [[_tex(cell) for cell in row] for row in plain]
        lines = [
            *(f"% {printable(line)}" for line in (title, *_above(comparison), "Needs \\usepackage{booktabs}.")),
            f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            "\\toprule",
            " & ".join(head) + " \\\\",
            "\\midrule",
            *(" & ".join(row) + " \\\\" for row in body),
            "\\bottomrule",
            "\\end{tabular}",
            *(f"% {printable(remark)}" for remark in _remarks(comparison)),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_BEFORE = (
    *("comparison", "model", "metric", "label", "method", "lr"),
    *("seeds", "mean", "standard_error", "best", "within_one_standard_error"),
)
_AFTER = ("paper_method", "paper_model", "paper_score", "failed")


def comma_separated(comparisons: Sequence[Comparison]) -> str:
    """All comparisons in one table with plain numbers, a row a method."""
    keys = list(dict.fromkeys(column.key for c in comparisons for column in columns_of(c, details=True)))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(_plain_cell, [*_BEFORE, *keys, *_AFTER]))
    for comparison in comparisons:
        columns = {column.key: column for column in columns_of(comparison, details=True)}
        for variant in comparison.variants:
            paper = comparison.paper.get(variant.name)
            numbers = [columns[key].value(variant) if key in columns else None for key in keys]
            row: list[object] = [comparison.recipe, comparison.model, comparison.metric, variant.label, variant.name]
            row += [variant.lr, len(variant.scores), variant.mean, variant.standard_error]
            row += [int(variant is comparison.best), int(comparison.near_best(variant)), *numbers]
            row += [paper.method, paper.model, paper.score] if paper else [None] * 3
            writer.writerow(map(_plain_cell, (*row, variant.failed)))
    return stream.getvalue()


FORMATS: dict[str, Callable[[Sequence[Comparison]], str]] = {"md": markdown, "csv": comma_separated, "latex": latex}


def _cells(comparison: Comparison, best: str, near: str) -> list[list[str]]:
    """The head and the rows as text, best first; of what stands in small print only errors and the paper's method."""
    heads, rows = table_of(comparison)
    marks = {"best": best, "near": near, "": "{}"}
    lines = [["Method", *(f"Paper ({head.title})" if head.kind == "paper" else head.title for head in heads)]]
    for variant, cells in rows:
        line = [variant.title]
        for head, cell in zip(heads, cells, strict=True):
            text = f"{cell.text} {cell.small}".strip() if head.kind == "score" else cell.text
            text = f"{cell.text} ({cell.small})" if head.kind in ("paper", "difference") and cell.small else text
            line.append(marks[cell.mark].format(text))
        lines.append(line)
    return lines


def _above(comparison: Comparison) -> list[str]:
    """What stands between the title and the table: what was compared, and what was found."""
    found = finding(comparison)
    return [f"{summary(comparison)}.", *([f"{found.sentence} {found.basis}".strip()] if found else [])]


def _remarks(comparison: Comparison) -> list[str]:
    remarks = [str(note) for note in comparison.notes]
    if comparison.paper:
        remarks.append(
            "The paper's figures are its authors', with their model and settings; they are not results of ours."
        )
    return remarks


def _markdown(text: str) -> str:
    """Text that is neither the end of a cell nor HTML."""
    return printable(text, keep="\x01").replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


_TEX = {"\\": "\\textbackslash{}", "±": "$\\pm$", "–": "--", "α": "$\\alpha$", "β": "$\\beta$", "≈": "$\\approx$"}
_TEX |= {character: "\\" + character for character in "&%$#_{}"}
_TEX |= {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\x01": "\\textbf{", "\x02": "\\textit{", "\x03": "}"}


_TEX |= {"[": "{[}", "*": "{*}"}  # which the end of a row before would take for its own


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in printable(text, keep="\x01\x02\x03"))


_FORMULA = "=+-@\t\r\n＝＋－＠"
"""A spreadsheet computes a cell that begins with one of these, also after spaces."""


def _plain_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: text that looks like one is put behind an apostrophe."""
    if isinstance(value, str) and value.lstrip(" ")[:1] and value.lstrip(" ")[0] in _FORMULA:
        return f"'{value}"
    return "" if value is None else value
