"""Showing the packaged recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import say


def recipes(
    name: Annotated[str | None, typer.Argument(help="One, to print it whole, or the beginning of several.")] = None,
) -> None:
    """List the packaged recipes with data, metric and the parameters of the adapter, or print one to start from."""
    from isotune.experiments.loading import packaged
    from isotune.experiments.suites import listing, whole

    say(whole(name) if name in packaged() else listing(name or ""))
