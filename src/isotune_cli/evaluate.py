"""Scoring an adapted language model."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Base, Trust, say


def evaluate_adapter(
    directory: Annotated[str, typer.Argument(help="The folder of an adapter of a language model.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas, as gsm8k,arc_easy.")],
    base: Base = None,
    few_shot: Annotated[int | None, typer.Option(help="Solved examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 8,
    include: Annotated[str | None, typer.Option(help="A folder with task files of your own.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Also write the scores as JSON.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Score an adapted language model by lm-evaluation-harness."""
    from isotune.experiments.evaluate import evaluate, table

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
    say(table(scores))
