"""Importing adapters of PEFT, and single files of diffusion tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import Base, Out, Trust, say


def import_adapter(
    directory: Annotated[
        str,
        typer.Argument(
            help="The folder of an adapter of PEFT's own PSOFT, OFT, BOFT or HRA, or a single .safetensors file of "
            "PEFT, kohya or OneTrainer (OFT, BOFT)."
        ),
    ],
    output: Out,
    base: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert an adapter of another tool to isotune's, the same function."""
    from isotune.files.diffusion.single import convert_single, with_config
    from isotune.files.peft_import import convert_peft

    if Path(directory).is_file():
        folder = with_config(directory)
        if folder is None:
            for written in convert_single(directory, output, base, trust_remote_code=trust_remote_code):
                say(f"wrote {written}")
            return
        directory = str(folder)
    convert_peft(directory, output, base, trust_remote_code=trust_remote_code)
    say(f"wrote {output}")
