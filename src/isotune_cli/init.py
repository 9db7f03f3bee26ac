"""Writing a recipe to start from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import say, write


def init(
    kind: Annotated[
        str, typer.Option("--for", help="chat, completion, preference (DPO), classification or images.")
    ] = "chat",
    model: Annotated[str | None, typer.Option(help="Folder, Hub name or package:NAME. Default: a small one.")] = None,
    data: Annotated[str | None, typer.Option(help="The file, or folder of images, to train on.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write.")] = "my-recipe.yaml",
) -> None:
    """Write a recipe for data of your own, with a comment on each key, for isotune train and compare."""
    from isotune.experiments.starting import starting

    path = Path(output)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{output}: the name of a recipe ends in .yaml")
    if path.exists():
        raise ValueError(f"{output} exists and is not overwritten; give another name with -o, or remove it")
    if data is not None and not Path(data).exists():
        raise ValueError(f"there is no {data}")
    text = starting(kind, model, data, path.stem)
    if data is not None and kind != "images" and Path(data).is_dir():
        raise ValueError(f"{data} is a folder; --for {kind} needs a file, and a folder of images --for images")
    write(output, text)
    say(f"wrote {output}; next: isotune train {shlex.quote(output)}")
