"""Importing adapters of PEFT, and single files of diffusion tools."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import Base, Out, Result, Trust


def import_adapter(
    directory: Annotated[
        str,
        typer.Argument(
            help="The folder of an adapter of PEFT's own PSOFT, OFT, BOFT, HRA or RoAd or of eigentune, or a "
            "single .safetensors file of PEFT, kohya or OneTrainer (OFT, BOFT)."
        ),
    ],
    output: Out,
    base: Base = None,
    trust_remote_code: Trust = False,
) -> Result:
    """Convert an adapter of another tool to one of isotune's that computes the same function."""
    from isotune.files.diffusion.single import convert_single, with_config
    from isotune.files.eigentune import convert_eigentune, is_eigentune
    from isotune.files.peft_import import convert_peft

    if Path(directory).is_file():
        folder = with_config(directory)
        if folder is None:
            return _wrote(convert_single(directory, output, base, trust_remote_code=trust_remote_code))
        directory = str(folder)
    convert = convert_eigentune if is_eigentune(directory) else convert_peft
    convert(directory, output, base, trust_remote_code=trust_remote_code)
    return _wrote([output])


def _wrote(places: Iterable[object]) -> Result:
    names = list(map(str, places))
    return Result("\n".join(f"wrote {name}" for name in names), {"wrote": names})
