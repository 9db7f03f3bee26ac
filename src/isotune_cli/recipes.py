"""Showing the packaged recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Result


def recipes(
    name: Annotated[str | None, typer.Argument(help="One, to print it whole, or the beginning of several.")] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List all keys of a recipe with their usual values, or those below NAME.")
    ] = False,
) -> Result:
    """List the packaged recipes with data, metric and the parameters of the adapter, or print one to start from."""
    if keys:
        from isotune.experiments import reference

        return Result(reference.to_text(name or ""), reference.reference(name or ""))
    from isotune.experiments.loading import packaged
    from isotune.experiments.suites import listing, whole

    known = packaged()
    if name in known:
        return Result(whole(name), known[name])
    return Result(listing(name or ""), {one: raw for one, raw in known.items() if one.startswith(name or "")})
