"""Reporting comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import say


def report_results(
    results: Annotated[list[str], typer.Argument(metavar="RESULTS...", help="Folders that isotune compare wrote.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The file to write; a table goes to stdout.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="html: the page. md, csv, latex: the table alone.")] = "html",
) -> None:
    """Show comparisons: one page that needs no network, or the table alone."""
    from isotune.experiments.files import write_text
    from isotune.report import table
    from isotune.report.page import render
    from isotune.report.results import read

    writers = {"html": render, **table.FORMATS}
    if form not in writers:
        raise ValueError(f"--format {form} is not one of {', '.join(writers)}")
    text = writers[form]([read(Path(folder)) for folder in results])
    if output is None and form == "html":
        output = "report.html"
    if output is None:
        say(text, nl=False)
    else:
        try:
            write_text(Path(output), text)
        except OSError as error:
            raise ValueError(f"cannot write {output}: {error.strerror}") from error
        say(f"wrote {output}")
