"""All commands, as one application."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from isotune_cli.chat import chat
from isotune_cli.compare import compare
from isotune_cli.evaluate import evaluate_adapter
from isotune_cli.export import export_adapter
from isotune_cli.extract import extract_adapter
from isotune_cli.init import init
from isotune_cli.inspect import inspect_adapter
from isotune_cli.merge import merge_folders
from isotune_cli.peft_import import import_adapter
from isotune_cli.plan import plan
from isotune_cli.rank import rank
from isotune_cli.recipes import recipes
from isotune_cli.report import report_results
from isotune_cli.shared import Group, command
from isotune_cli.train import train

app = typer.Typer(
    help="Orthogonal and principal-subspace fine-tuning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    cls=Group,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"isotune {version('isotune')}")
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


_COMMANDS: dict[str, Callable[..., Any]] = {
    "init": init,
    "train": train,
    "compare": compare,
    "recipes": recipes,
    "chat": chat,
    "eval": evaluate_adapter,
    "inspect": inspect_adapter,
    "report": report_results,
    "plan": plan,
    "rank": rank,
    "export": export_adapter,
    "extract": extract_adapter,
    "merge": merge_folders,
    "import": import_adapter,
}
for _name, _function in _COMMANDS.items():
    app.command(_name)(command(_function))
