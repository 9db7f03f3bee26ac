"""Merging adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isotune_cli.shared import Out, Result


def merge_folders(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTERS",
            help="The folders of adapters of one method on one base model, or of their runs.",
        ),
    ],
    output: Out,
    weights: Annotated[
        str | None,
        typer.Option(
            help="One number for each adapter, such as --weights 0.7 0.3, or --weights=0.7,-0.2 where one is below 0. "
            "By default they are equal and sum to 1."
        ),
    ] = None,
    how: Annotated[
        str,
        typer.Option(
            help="Which mean: rotation, of the logarithms of rotations; or orthomerge, of their generators with the "
            "mean of their magnitudes."
        ),
    ] = "rotation",
    base: Annotated[
        str | None,
        typer.Option(help="The base model that the new adapter names, where the adapters name different ones."),
    ] = None,
) -> Result:
    """Write the weighted mean of adapters as one adapter, from their files alone."""
    from isotune.files.export_runs import only_adapter
    from isotune.tools.merging import merge_adapters

    # The numbers after the first one of --weights are arguments, as a shell's options take one value each.
    numbers = [text for text in directories if _is_number(text) and not Path(text).exists()]
    if numbers and weights is None:
        raise ValueError(f"{numbers[0]!r} is no folder; numbers follow --weights.")
    folders = [only_adapter(text) for text in directories if text not in numbers]
    given = None if weights is None else [text for part in (weights, *numbers) for text in part.split(",")]
    if given is not None and not all(map(_is_number, given)):
        raise ValueError(f"--weights {' '.join(given)} must be one number for each adapter, such as --weights 0.7 0.3")
    kind: Any = how
    found = merge_adapters(folders, output, None if given is None else list(map(float, given)), kind, base=base)
    return Result(f"wrote {output}: {found}", {"wrote": output, **found.to_dict()})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
