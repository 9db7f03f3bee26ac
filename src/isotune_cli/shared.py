"""What commands share: their options and output, errors in one line, and output that commands no terminal."""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from isotune_cli import leave

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the base model's repository carries.")]
Base = Annotated[
    str | None,
    typer.Option(help="The base model: a folder, a Hub name or package:NAME. By default it is what the adapter names."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print what the libraries log, too.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's, such as train.lr=1e-3 method.r=64."),
]
Out = Annotated[str, typer.Option("--output", "-o", help="The new folder or file to write.")]
Adapter = Annotated[str, typer.Argument(help="The folder of an adapter, or of a run with one adapter in it.")]

_ON_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
_LONG = re.compile(r"\S{400,}")
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled")


@dataclass(frozen=True)
class Result:
    """What a command has come to: `text` for people, `data` for --json; the exit code is 1 where something failed."""

    text: str
    data: Any
    failed: bool = False


def command(function: Callable[..., Result | None]) -> Callable[..., None]:
    """A function as a command: with -q and -v, --json where it has a result, errors in one line, and its result said.

    An error which the user can mend is a ValueError; it becomes one line and exit code 2. Other errors keep a
    traceback. Ctrl-C ends with code 130.
    """
    # Not by get_type_hints: before Python 3.11 it hides what is said of a parameter whose default is None.
    signature = inspect.signature(function, eval_str=True)
    shared: dict[str, Any] = {"quiet": Quiet, "verbose": Verbose}
    if signature.return_annotation is not None:
        shared["as_json"] = Json

    def called(*, quiet: bool, verbose: bool, as_json: bool = False, **options: Any) -> None:
        with _one_line_errors():
            if quiet and verbose:
                raise ValueError("give --quiet or --verbose, and not both")
            with _output(quiet, verbose):
                found = function(**options)
            if found is not None:
                say(json.dumps(found.data, indent=2) if as_json else found.text)
                if found.failed:
                    raise typer.Exit(1)

    own = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for n, a in shared.items()
    ]
    called.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    called.__name__, called.__doc__ = function.__name__, function.__doc__
    return called


def command_line() -> str:
    """What was typed, for a record that says how to repeat it."""
    return shlex.join(["isotune", *sys.argv[1:]])


def say(text: str, *, err: bool = False) -> None:
    """Print text, with what is not printable in it, such as a terminal's escape sequences, written as escapes."""
    from isotune.experiments.text import printable

    typer.echo(printable(text, keep="\n\t"), err=err)


def write(output: str, text: str) -> None:
    """Write a file of a command; raises ValueError where it cannot be."""
    from isotune.experiments.files import write_text

    try:
        write_text(Path(output), text)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}") from error


def failed_on_disk(error: Exception) -> str | None:
    """What a file or folder could not be read or written for, in one line; None if the error is of another kind."""
    if isinstance(error, OSError) and error.errno in _ON_DISK:
        return f"cannot read or write {error.filename or 'a file'}: {error.strerror}"
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return f"cannot read or write the weights: {error}"
    return None


def brief(text: str) -> str:
    """A message without the middle of what is too long in it to be read."""
    text = _LONG.sub(lambda found: f"{found[0][:250]}…{found[0][-100:]}", text)
    return text if len(text) <= 2500 else f"{text[:1500]} … {text[-800:]}"


class Group(TyperGroup):
    """Commands whose own errors, about arguments that do not fit, are brief too."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the arguments."""
        with _brief_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Call a command."""
        with _brief_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _brief_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(said := getattr(error, "message", None), str):  # click's own, whose home typer has moved
            setattr(error, "message", brief(said))  # noqa: B010
        raise


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        say("interrupted; the same command again goes on from what was finished", err=True)
        raise typer.Exit(130) from stop
    except Exception as error:
        reason = failed_on_disk(error) or (str(error) if isinstance(error, ValueError) else None)
        if reason is None:
            raise
        said = f"error: {reason}"
        if _is_unreachable(error):
            said += "; nothing on the network could be reached: give a folder on this machine, or "
            said += (
                "unset HF_HUB_OFFLINE to download it"
                if os.environ.get("HF_HUB_OFFLINE")
                else "set HF_HUB_OFFLINE=1 to use what was downloaded before"
            )
        say(brief(said), err=True)
        raise typer.Exit(2) from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error comes of a network that is not there, or is not to be used."""
    while error is not None:
        if any(kind.__name__ in _UNREACHABLE for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Lines(logging.Handler):
    """Lines of a log on stderr, above whatever bars there are."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def _output(quiet: bool, verbose: bool) -> Iterator[None]:
    """What is shown on stderr while a command runs."""
    if verbose:  # before the libraries are imported, which look at it once; processes that are started see it too
        os.environ |= dict.fromkeys(("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"), "info")
    from isotune.internals.progress_bars import show_progress

    if signal.getsignal(signal.SIGINT) is leave:  # from here on Ctrl-C is something that commands know of
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handler, own, root, warn = _Lines(), logging.getLogger("isotune"), logging.getLogger(), warnings.showwarning
    own.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    logger = root if verbose else own
    level = root.level
    logger.addHandler(handler)
    if verbose:
        root.setLevel(logging.INFO)
    if quiet:
        warnings.showwarning = lambda *_, **__: None
    show_progress("none" if quiet else "bars" if sys.stderr.isatty() else "lines")
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by the older of two names.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeHandler(handler)
        own.setLevel(logging.NOTSET)
        root.setLevel(level)
        warnings.showwarning = warn
        show_progress("bars")
