"""The command line: `isotune COMMAND`. Commands import what does the work when called, so --help is quick."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isotune.files.export_lora import LoraOptions

app = typer.Typer(
    help="Orthogonal and principal-subspace fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """With a callback a single command keeps its name."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a ValueError, which the user can mend, into one line and exit code 2; others keep a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        typer.echo("interrupted: run the same command again to continue", err=True)
        raise typer.Exit(130) from stop
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as demo, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.lr=1e-3.")
    ] = None,
) -> None:
    """Train and score a recipe; run the same command again to continue after an interruption."""
    with plain_errors():
        from isotune.experiments.recipe import load

        loaded = load(recipe, overrides or ())
        from isotune.experiments import train as training

        training.train(loaded)


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe, such as glue/cola, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.epochs=4.")
    ] = None,
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
    with plain_errors():
        import sys
        from pathlib import Path

        from isotune.experiments import compare as comparing
        from isotune.experiments import engines, processes
        from isotune.experiments.recipe import load
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
            command=comparing.command_line(sys.argv[1:]),
        )
        plan = comparing.plan(recipe, loaded, options, folder)
        for note in plan.notes:
            typer.echo(note)
        typer.echo(f"{plan.total()} runs, {len(plan.records)} of them done; results in {folder}")
        chosen = engines.make(engine, jobs, options.threads, address)
        result = comparing.compare(plan, chosen)
        typer.echo(table(result["metric"], result["rows"]))
        if any(row["failed"] for row in result["rows"]):
            raise typer.Exit(1)


@app.command()
def recipes() -> None:
    """List the packaged recipes with model, data, metric and the parameters of the adapter."""
    from isotune.experiments.suites import listing

    typer.echo(listing())


_TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the base model's repository carries.")]
_BASE = Annotated[
    str | None, typer.Option(help="Base model: folder, Hub name or package:NAME. Default: what the adapter names.")
]
_OUT = Annotated[str, typer.Option("--output", "-o", help="A new folder to write.")]


@app.command("eval")
def evaluate_adapter(
    directory: Annotated[str, typer.Argument(help="The folder of an adapter of a language model.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas, as gsm8k,arc_easy.")],
    base: _BASE = None,
    few_shot: Annotated[int | None, typer.Option(help="Solved examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 8,
    include: Annotated[str | None, typer.Option(help="A folder with task files of your own.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Also write the scores as JSON.")] = None,
    trust_remote_code: _TRUST = False,
) -> None:
    """Score an adapted language model by lm-evaluation-harness."""
    with plain_errors():
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
        typer.echo(table(scores))


@app.command("inspect")
def inspect_adapter(
    directory: Annotated[str, typer.Argument(help="An adapter's folder.")],
    base: _BASE = None,
    png: Annotated[str | None, typer.Option(help="Also draw a picture into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_remote_code: _TRUST = False,
) -> None:
    """Show what an adapter has learnt, layer by layer."""
    with plain_errors():
        import json

        from isotune.diagnostics.inspect import inspect, save_png, to_text

        report = inspect(directory, base, trust_remote_code=trust_remote_code)
        if png is not None:
            save_png(report, png)
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else to_text(report))


@app.command("report")
def report_results(
    results: Annotated[list[str], typer.Argument(metavar="RESULTS...", help="Folders that isotune compare wrote.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The file to write; a table goes to stdout.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="html: the page. md, csv, latex: the table alone.")] = "html",
) -> None:
    """Show comparisons: one page that needs no network, or the table alone."""
    with plain_errors():
        from pathlib import Path

        from isotune.experiments.files import write_text
        from isotune.report import table
        from isotune.report.page import render
        from isotune.report.results import read

        writers = {"html": render, **table.FORMATS}
        if form not in writers:
            raise ValueError(f"--format {form} is not one of {', '.join(writers)}")
        text = writers[form]([read(Path(folder)) for folder in results])
        if output is None and form == "html":
            output = "report.html"
        if output is None:
            typer.echo(text, nl=False)
        else:
            try:
                write_text(Path(output), text)
            except OSError as error:
                raise ValueError(f"cannot write {output}: {error.strerror}") from error
            typer.echo(f"wrote {output}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder, Hub name or package:NAME; only its config.json is read.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of the method, such as oft_block_size=32.")
    ] = None,
    method: Annotated[str, typer.Option(help="As in a recipe: psoft, oft, hra, lora_xs, lora, full, …")] = "psoft",
    rank: Annotated[int | None, typer.Option(help="r of the method.")] = None,
    devices: Annotated[int, typer.Option(help="How many devices compute batches side by side.")] = 1,
    sharding: Annotated[
        str | None, typer.Option(help="ddp (default for several devices), zero1, zero2, zero3 or fsdp.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")] = None,
    quantization: Annotated[str, typer.Option(help="Of the base: none, nf4, nf4-double, int8 or int4.")] = "none",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit or sgd.")] = "adamw",
    batch: Annotated[int, typer.Option(help="Sequences of one device and step.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activations are computed again.")] = False,
    accelerator: Annotated[str, typer.Option(help="h200, h100, a100, l40s or l4.")] = "h100",
    flops: Annotated[float | None, typer.Option(help="Operations a second of another device, such as 300e12.")] = None,
    utilization: Annotated[float, typer.Option(help="Share of its speed that a device reaches.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Estimate memory and time of a fine-tuning from the model's configuration alone."""
    with plain_errors():
        import json

        from isotune.experiments.plan import Setting, parse_options, to_text
        from isotune.experiments.plan import plan as estimate

        chosen = {**({} if rank is None else {"r": rank}), **parse_options(options or ())}
        found = estimate(
            Setting(
                model,
                method,
                chosen,
                devices,
                sharding,
                dtype,
                quantization,
                optimizer,
                batch,
                sequence,
                checkpointing,
                accelerator,
                flops,
                utilization,
            )
        )
        typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else to_text(found))


@app.command("export")
def export_adapter(
    directory: Annotated[str, typer.Argument(help="An adapter's folder; with --to lora also one that holds several.")],
    to: Annotated[str, typer.Option(help="lora: an ordinary PEFT LoRA folder. merged: a plain model folder.")],
    output: _OUT,
    base: _BASE = None,
    rank: Annotated[int | None, typer.Option(help="Largest LoRA rank; approximates what has a higher one.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each layer's update to keep, such as 0.999, which gives its LoRA rank."),
    ] = None,
    uniform_rank: Annotated[bool, typer.Option("--uniform-rank", help="Fill all layers up to one LoRA rank.")] = False,
    trust_remote_code: _TRUST = False,
) -> None:
    """Write an adapter, or all checkpoints in a folder, in a form that needs no isotune."""
    with plain_errors():
        if to not in ("lora", "merged"):
            raise ValueError(f"--to {to} is not one of lora, merged")
        if to == "merged":
            if rank is not None or energy is not None or uniform_rank:
                raise ValueError("--rank, --energy and --uniform-rank are for --to lora; a merged model is exact.")
            from isotune.files.export_lora import export_merged

            export_merged(directory, output, base=base, trust_remote_code=trust_remote_code)
            typer.echo(f"wrote {output}")
            return
        from isotune.files.export_lora import LoraOptions, has_adapter

        options = LoraOptions(rank, energy, uniform_rank)
        if has_adapter(directory):
            _export_one(directory, output, base, options, trust_remote_code)
        else:
            _export_runs(directory, output, base, options, trust_remote_code)


def _export_one(directory: str, output: str, base: str | None, options: LoraOptions, trust: bool) -> None:
    from isotune.files.export_lora import export_lora
    from isotune.files.lora_servers import describe_obstacles

    report = export_lora(directory, output, base=base, **asdict(options), trust_remote_code=trust)
    if report.error:
        width = max(len(layer.name) for layer in report.layers)
        for layer in report.layers:
            typer.echo(f"{layer.name:{width}}  rank {layer.rank:4}  error {layer.error:.2e}")
    typer.echo(f"wrote {output}: {report}")
    typer.echo(describe_obstacles(output))


def _export_runs(directory: str, output: str, base: str | None, options: LoraOptions, trust: bool) -> None:
    from isotune.files.export_runs import export_lora_runs

    result = export_lora_runs(directory, output, base, **asdict(options), trust_remote_code=trust)
    for name, report in result.written.items():
        typer.echo(f"wrote {output}/{name}: {report}")
    for name in result.skipped:
        typer.echo(f"{output}/{name} was there already")
    for name, reason in result.failed.items():
        typer.echo(f"failed {directory}/{name}: {reason}", err=True)
    if result.failed:
        raise typer.Exit(1)


@app.command("import")
def import_adapter(
    directory: Annotated[str, typer.Argument(help="The folder of an adapter of PEFT's own PSOFT, OFT, BOFT or HRA.")],
    output: _OUT,
    base: _BASE = None,
    trust_remote_code: _TRUST = False,
) -> None:
    """Convert an adapter of PEFT's own PSOFT, OFT, BOFT or HRA to isotune's, the same function."""
    with plain_errors():
        from isotune.files.peft_import import convert_peft

        convert_peft(directory, output, base, trust_remote_code=trust_remote_code)
        typer.echo(f"wrote {output}")


def main() -> None:
    """The entry point of the command `isotune`."""
    app()
