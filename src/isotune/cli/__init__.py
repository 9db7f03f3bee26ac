"""The command line: `isotune COMMAND`. Commands import what does the work when called, so --help is quick."""

from __future__ import annotations

from collections.abc import Callable

import typer

from isotune.cli.compare import compare
from isotune.cli.evaluate import evaluate_adapter
from isotune.cli.export import export_adapter
from isotune.cli.inspect import inspect_adapter
from isotune.cli.peft_import import import_adapter
from isotune.cli.plan import plan
from isotune.cli.recipes import recipes
from isotune.cli.report import report_results
from isotune.cli.shared import one_line_errors
from isotune.cli.train import train

app = typer.Typer(
    help="Orthogonal and principal-subspace fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "compare": compare,
    "recipes": recipes,
    "eval": evaluate_adapter,
    "inspect": inspect_adapter,
    "report": report_results,
    "plan": plan,
    "export": export_adapter,
    "import": import_adapter,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(one_line_errors()(_command))


def main() -> None:
    """The entry point of the command `isotune`."""
    app()
