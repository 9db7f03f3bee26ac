"""Scoring an adapted language model."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Adapter, Base, Result, Trust


def evaluate_adapter(
    directory: Adapter,
    tasks: Annotated[
        str, typer.Option(help="The tasks of lm-evaluation-harness, separated by commas, such as gsm8k,arc_easy.")
    ],
    base: Base = None,
    few_shot: Annotated[int | None, typer.Option(help="How many solved examples precede each question.")] = None,
    limit: Annotated[int | None, typer.Option(help="How many questions of each task are asked at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="How many sequences a forward pass has.")] = 8,
    include: Annotated[str | None, typer.Option(help="A folder with more task files.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A JSON file to write the scores to, too.")
    ] = None,
    trust_remote_code: Trust = False,
) -> Result:
    """Score an adapted language model by lm-evaluation-harness."""
    from isotune.experiments.evaluate import evaluate, table
    from isotune.files.export_runs import only_adapter

    directory = only_adapter(directory)
    scores = evaluate(
        directory,
        [name.strip() for name in tasks.split(",") if name.strip()],
        base,
        few_shot=few_shot,
        limit=limit,
        batch_size=batch_size,
        include=include,
        output=output,
        trust_remote_code=trust_remote_code,
    )
    return Result(table(scores), {"adapter": directory, "few_shot": few_shot, "limit": limit, "results": scores})
