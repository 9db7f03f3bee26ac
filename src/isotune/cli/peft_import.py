"""Importing adapters of PEFT."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune.cli.shared import Base, Out, Trust, say


def import_adapter(
    directory: Annotated[str, typer.Argument(help="The folder of an adapter of PEFT's own PSOFT, OFT, BOFT or HRA.")],
    output: Out,
    base: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert an adapter of PEFT's own PSOFT, OFT, BOFT or HRA to isotune's, the same function."""
    from isotune.files.peft_import import convert_peft

    convert_peft(directory, output, base, trust_remote_code=trust_remote_code)
    say(f"wrote {output}")
