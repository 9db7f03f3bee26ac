"""Writing a recipe to start from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import say, write


def init(
    kind: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="chat, completion, preference (DPO), classification or images. By default what the columns of --data "
            "tell; without --data chat.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder, Hub name or package:NAME. Default: a small one.")] = None,
    data: Annotated[str | None, typer.Option(help="The file, or folder of images, to train on.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write.")] = "my-recipe.yaml",
) -> None:
    """Write a recipe for data of your own, with a comment on each key, for isotune train and compare."""
    from isotune.experiments.own_columns import fit
    from isotune.experiments.starting import starting

    path, quoted = Path(output), shlex.quote(output)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{output}: the name of a recipe ends in .yaml")
    if path.exists():
        raise ValueError(f"{output} exists and is not overwritten; give another name with -o, or remove it")
    if data is None:
        kind = kind or "chat"
        write(output, starting(kind, model, name=path.stem))
        say(f"wrote {output} for {kind}; name your data there (data.files.train), then: isotune train {quoted}")
        return
    if not Path(data).exists():
        raise ValueError(f"there is no {data}")
    kind, renamed = fit(Path(data), kind)
    write(output, starting(kind, model, data, path.stem, renamed))
    columns = "".join(f", {old} for {new}" for old, new in renamed.items())
    say(f"wrote {output} for {kind}{columns}; next: isotune train {quoted}")
