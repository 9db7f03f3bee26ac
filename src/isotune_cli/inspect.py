"""Looking into an adapter."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from isotune_cli.shared import Base, Json, Trust, say


def inspect_adapter(
    directory: Annotated[str, typer.Argument(help="An adapter's folder.")],
    base: Base = None,
    png: Annotated[str | None, typer.Option(help="Also draw a picture into this file.")] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what an adapter has learnt, layer by layer."""
    from isotune.diagnostics.inspect import inspect
    from isotune.report.adapter import save_png, to_text

    report = inspect(directory, base, trust_remote_code=trust_remote_code)
    if png is not None:
        save_png(report, png)
    say(json.dumps(report.to_dict(), indent=2) if as_json else to_text(report))
