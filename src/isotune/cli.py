"""The command line: `isotune COMMAND`. Commands import what does the work when called, so --help is quick."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

app = typer.Typer(
    help="Orthogonal and principal-subspace fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """With a callback a single command keeps its name."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a ValueError, which the user can mend, into one line and exit code 2; others keep a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        typer.echo("interrupted: run the same command again to continue", err=True)
        raise typer.Exit(130) from stop
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as demo, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.lr=1e-3.")
    ] = None,
) -> None:
    """Train and score a recipe; run the same command again to continue after an interruption."""
    with plain_errors():
        from isotune.experiments.recipe import load

        loaded = load(recipe, overrides or ())
        from isotune.experiments.run import run

        run(loaded)


@app.command()
def recipes() -> None:
    """List the packaged recipes with model, data and metric."""
    from isotune.experiments.recipe import listing

    typer.echo(listing())


def main() -> None:
    """The entry point of the command `isotune`."""
    app()
