"""Training a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Overrides


def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as demo, or a YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Train and score a recipe; run the same command again to continue after an interruption."""
    from isotune.experiments.loading import load

    loaded = load(recipe, overrides or ())
    from isotune.experiments import train as training

    training.train(loaded)
