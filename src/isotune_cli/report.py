"""Reporting comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import Result, write


def report_results(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULTS", help="Folders that isotune compare or train wrote, or of results of PEFT's benchmark."
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The file to write. By default it is report.html; a table goes to stdout."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="What is written: html, the page, or the table alone as md, csv or latex.")
    ] = "html",
) -> Result:
    """Show comparisons and trainings: one page that needs no network, or the table alone."""
    from isotune.report import table
    from isotune.report.page import render
    from isotune.report.reading import comparisons

    writers = {"html": render, **table.FORMATS}
    if form not in writers:
        raise ValueError(f"--format {form} is not one of {', '.join(writers)}")
    found = comparisons([Path(folder) for folder in results])
    text = writers[form](found)
    if output is None and form == "html":
        output = "report.html"
    if output is not None:
        write(output, text)
        text = f"wrote {output}"
    about = ("recipe", "task", "model", "metric")
    data = [
        {"folder": str(one.folder)}
        | {name: getattr(one, name) for name in about}
        | {"rows": [variant.row() for variant in one.variants]}
        for one in found
    ]
    return Result(text.rstrip("\n"), {"wrote": output, "results": data})
