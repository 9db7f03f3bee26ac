"""Looking into an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Adapter, Base, Result, Trust, failed_on_disk, say


def inspect_adapter(
    directory: Adapter,
    base: Base = None,
    png: Annotated[str | None, typer.Option(help="A PNG file to draw a picture into, too.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every layer in the order of the model, with every column.")
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(
            help="How many of each weight's strongest directions ρ is of; by default what OPLoRA preserves, else 16."
        ),
    ] = None,
    trust_remote_code: Trust = False,
) -> Result:
    """Show what an adapter has learnt: the layers that it turned farthest, or with --all every layer."""
    from isotune.diagnostics.inspect import inspect
    from isotune.files.export_runs import only_adapter
    from isotune.report.adapter import save_png, to_text

    report = inspect(only_adapter(directory), base, top=top, trust_remote_code=trust_remote_code)
    drawn = True
    if png is not None:
        try:
            save_png(report, png)
        except OSError as error:  # what was found took longer than a picture
            say(f"error: {failed_on_disk(error) or error}", err=True)
            drawn = False
    return Result(to_text(report, everything=everything), report.to_dict(), failed=not drawn)
