"""Comparing methods."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import Overrides, say


def compare(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as glue/cola, or a YAML file.")],
    overrides: Overrides = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Separated by commas, each with options if need be: psoft:r=64+psoft_mag_a=false,lora:r=8."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds for each method at its best learning rate.")] = 3,
    lr_search: Annotated[int, typer.Option(help="Learning rates tried for each method, around its usual one.")] = 3,
    lr: Annotated[str | None, typer.Option(help="The rates to try for every method instead: 1e-3,2e-3.")] = None,
    lr_factor: Annotated[float, typer.Option(help="From one rate of a search to the next.")] = 2.5,
    match_params: Annotated[
        str | None, typer.Option(help="Size each method's adapter to about so many parameters, such as 80k.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a run. Default: processors / jobs.")] = None,
    engine: Annotated[str, typer.Option(help="local: processes of this machine. ray: tasks of Ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster. Default: Ray on this machine.")] = None,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Keep the weights of all runs.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder. Default: runs/compare/RECIPE.")] = None,
) -> None:
    """Compare methods: equal searches for the learning rate, then seeds; the same command again continues."""
    from isotune.experiments import compare as comparing
    from isotune.experiments import engines, processes
    from isotune.experiments.loading import load
    from isotune.experiments.table import table

    processes.require_alone("isotune compare")
    loaded = load(recipe, overrides or ())
    folder = Path(output or f"runs/compare/{Path(loaded.output or recipe).name}")
    options = comparing.Options(
        methods=[one for text in methods or () for one in comparing.split_methods(text)],
        seeds=seeds,
        lr_search=lr_search,
        rates=comparing.rates(lr) if lr else (),
        factor=lr_factor,
        match_params=comparing.whole_number(match_params) if match_params is not None else None,
        threads=threads or max(1, engines.processors() // jobs),
        keep_adapters=keep_adapters,
        command=shlex.join(["isotune", *sys.argv[1:]]),
    )
    plan = comparing.plan(recipe, loaded, options, folder)
    for note in plan.notes:
        say(note)
    say(f"{plan.total()} runs, {len(plan.records)} of them done; results in {folder}")
    chosen = engines.make(engine, jobs, options.threads, address)
    result = comparing.compare(plan, chosen)
    say(table(result["metric"], result["rows"]))
    if any(row["failed"] for row in result["rows"]):
        raise typer.Exit(1)
