"""Comparing methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isotune_cli.shared import Overrides, Result, command_line
from isotune_cli.train import DryRun


def compare(
    recipe: Annotated[str, typer.Argument(help="The name of a packaged recipe, such as glue/cola, or a YAML file.")],
    overrides: Overrides = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="The methods, separated by commas, each with options where it needs some: "
            "psoft:r=64+psoft_mag_a=false,lora:r=8. By default they are those of the recipe."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds each method has at its best learning rate.")] = 3,
    lr_search: Annotated[
        str,
        typer.Option(
            help="How many learning rates are tried for each method, around its usual one; or auto: as many as it "
            "takes for the best to lie inside."
        ),
    ] = "3",
    lr_runs: Annotated[
        int | None, typer.Option(help="How many learning rates --lr-search auto may try for each method, 8 by default.")
    ] = None,
    lr: Annotated[
        str | None, typer.Option(help="The learning rates to try for every method instead, such as 1e-3,2e-3.")
    ] = None,
    lr_factor: Annotated[
        float, typer.Option(help="The ratio of one learning rate of a search to the one below.")
    ] = 2.5,
    match_params: Annotated[
        str | None, typer.Option(help="Size each method's adapter to about so many parameters, such as 80k.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs are trained at a time.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="How many threads a run has. By default the runs share the processors."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Where runs are trained: local, in processes of this machine, or ray, as tasks of Ray.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="The address of a running Ray cluster. By default Ray is started here.")
    ] = None,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Keep the weights of all runs.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder to write. By default it is runs/compare/RECIPE.")
    ] = None,
    dry_run: DryRun = False,
) -> Result:
    """Compare methods: equal searches for the learning rate, then seeds; the same command again continues."""
    from isotune.experiments import compare as comparing
    from isotune.experiments import engines, preview, processes
    from isotune.experiments.loading import load
    from isotune.experiments.runner import carry_out
    from isotune.experiments.table import table

    processes.require_alone("isotune compare")
    loaded = load(recipe, overrides or ())
    folder = Path(output or f"runs/compare/{Path(loaded.output or recipe).name}")
    options = comparing.Options(
        methods=[one for text in methods or () for one in comparing.split_methods(text)],
        seeds=seeds,
        lr_search=comparing.searched(lr_search),
        lr_runs=lr_runs,
        rates=comparing.rates(lr) if lr else (),
        factor=lr_factor,
        match_params=comparing.whole_number(match_params) if match_params is not None else None,
        threads=threads or max(1, engines.processors() // jobs),
        keep_adapters=keep_adapters,
        command=command_line(),
    )
    schedule = comparing.plan(recipe, loaded, options, folder)
    if dry_run:
        found = preview.preview(schedule)
        return Result(preview.to_text(found), found)
    result = carry_out(schedule, engines.make(engine, jobs, options.threads, address))
    return Result(table(result), result, failed=any(row["failed"] for row in result["rows"]))
