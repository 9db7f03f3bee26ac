"""Training a recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune_cli.shared import Overrides, Result, command_line

if TYPE_CHECKING:
    from isotune.experiments.recipe import Recipe

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be trained, and what it needs; train and write nothing.")
]


def train(
    recipe: Annotated[str, typer.Argument(help="The name of a packaged recipe, such as demo, or a YAML file.")],
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The folder to write, as output=FOLDER. By default the recipe's."),
    ] = None,
    dry_run: DryRun = False,
) -> Result | None:
    """Train and score a recipe; run the same command again to continue after an interruption."""
    from isotune.experiments.loading import load

    folder = [] if output is None else [f"output={json.dumps(output)}"]
    loaded = load(recipe, [*(overrides or ()), *folder])
    from isotune.experiments import preview, processes, table
    from isotune.experiments import train as training

    if dry_run:
        found = preview.preview(training.plan(loaded))
        text = preview.to_text(found)
    else:
        found = training.train(loaded, command_line())
        text = "\n".join([table.table(found), *_next(loaded, found)])
    return Result(text, found) if processes.is_main() else None


def _next(recipe: Recipe, found: Mapping[str, Any]) -> list[str]:
    """A line about where the adapter lies, and the commands for it; of another library's there are none."""
    from isotune.experiments import registry
    from isotune.methods import METHODS

    folder = shlex.quote(found["adapter"])
    if registry.entry(recipe.method.name).base not in METHODS:
        return [f"{'weights' if registry.is_plain(recipe.method.name) else 'adapter'}: {folder}"]
    others = "export or chat" if recipe.task == "chat" else "export"
    return [f"adapter: {folder}; next: isotune inspect {folder}, or {others}"]
