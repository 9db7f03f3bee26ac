"""Choosing ranks and block sizes."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Result, Trust


def rank(
    model: Annotated[str, typer.Argument(help="The base model: a folder, a Hub name or package:NAME.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options of the method, such as psoft_mag_a=false or side=output."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Trainable parameters of all layers together, such as 80k.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="The share of its energy that each layer keeps. By default 0.9, or 0.95 for CERSA."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file of texts or conversations, or a folder of images: energy is then that of the outputs."
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="The column of the file that holds the texts.")] = "text",
    method: Annotated[str, typer.Option(help="psoft, lora_xs, … for ranks; oft or boft for block sizes.")] = "psoft",
    target: Annotated[
        str, typer.Option(help="The modules to adapt, separated by commas, or all-linear.")
    ] = "all-linear",
    values: Annotated[
        bool, typer.Option("--values", help="Let energy be the sum of the singular values, and not of their squares.")
    ] = False,
    trust_remote_code: Trust = False,
) -> Result:
    """Choose a rank or a block size for each layer: for a budget of parameters, or for a share of the energy."""
    from isotune.experiments.planning.setting import parse_options
    from isotune.experiments.ranks import Question, rank

    modules = target if target == "all-linear" else [name.strip() for name in target.split(",") if name.strip()]
    given = {"target_modules": modules, **parse_options(options or ())}
    return Result(*rank(Question(model, method, given, budget, energy, data, text, values, trust_remote_code)))
