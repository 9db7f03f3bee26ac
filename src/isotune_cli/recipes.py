"""Listing the packaged recipes."""

from __future__ import annotations

from isotune_cli.shared import say


def recipes() -> None:
    """List the packaged recipes with model, data, metric and the parameters of the adapter."""
    from isotune.experiments.suites import listing

    say(listing())
