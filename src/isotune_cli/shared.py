"""What commands share: errors in one line, output that commands no terminal, and options that several have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the base model's repository carries.")]
Base = Annotated[
    str | None, typer.Option(help="Base model: folder, Hub name or package:NAME. Default: what the adapter names.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.lr=1e-3 or train.epochs=4.")
]
Out = Annotated[str, typer.Option("--output", "-o", help="A new folder to write.")]


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text, with what is not printable in it, such as a terminal's escape sequences, written as escapes."""
    from isotune.experiments.text import printable

    typer.echo(printable(text, keep="\n\t"), err=err, nl=nl)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a ValueError, which the user can mend, into one line and exit code 2; other errors keep a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        say("interrupted: run the same command again to continue", err=True)
        raise typer.Exit(130) from stop
    except ValueError as error:
        say(f"error: {error}", err=True)
        raise typer.Exit(2) from error
