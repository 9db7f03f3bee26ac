"""The command line: `isotune COMMAND`. Commands import isotune when they are called, so that --help is quick."""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """The entry point of the command `isotune`."""
    # Ctrl-C while libraries are imported would leave a traceback, or an error of a library half imported.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    from isotune_cli.commands import app

    app()


def leave(*_: Any) -> None:
    """End the process at once, as Ctrl-C does before a command has begun; there is nothing to be saved yet."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def __getattr__(name: str) -> Any:
    if name == "app":
        from isotune_cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
