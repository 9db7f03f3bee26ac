"""Training a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Overrides, Result, command_line

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be trained, and what it needs; train and write nothing.")
]


def train(
    recipe: Annotated[str, typer.Argument(help="The name of a packaged recipe, such as demo, or a YAML file.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> Result | None:
    """Train and score a recipe; run the same command again to continue after an interruption."""
    from isotune.experiments.loading import load

    loaded = load(recipe, overrides or ())
    from isotune.experiments import preview, processes, table
    from isotune.experiments import train as training

    if dry_run:
        found = preview.preview(training.plan(loaded))
        text = preview.to_text(found)
    else:
        found = training.train(loaded, command_line())
        text = table.table(found)
    return Result(text, found) if processes.is_main() else None
