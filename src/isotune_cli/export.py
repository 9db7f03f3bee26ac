"""Exporting adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isotune_cli.shared import Base, Out, Trust, say


def export_adapter(
    directory: Annotated[
        str, typer.Argument(help="An adapter's folder, or a run's; with --to lora also one that holds several.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="lora: an ordinary PEFT LoRA folder. merged: a plain model. peft: PEFT's own OFT or BOFT. "
            "kohya, lycoris: a rotation as one file."
        ),
    ],
    output: Out,
    base: Base = None,
    rank: Annotated[int | None, typer.Option(help="Largest LoRA rank; approximates what has a higher one.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each layer's update to keep, such as 0.999, which gives its LoRA rank."),
    ] = None,
    uniform_rank: Annotated[bool, typer.Option("--uniform-rank", help="Fill all layers up to one LoRA rank.")] = False,
    names: Annotated[
        str | None, typer.Option(help="diffusers or kohya: one LoRA file of a model of diffusers, with these names.")
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="text_encoder, text_encoder_1 or _2: which one of its pipeline the base of one file is."),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write an adapter, or all checkpoints in a folder, in a form that needs no isotune."""
    if to not in ("lora", "merged", "peft", "kohya", "lycoris"):
        raise ValueError(f"--to {to} is not one of lora, merged, peft, kohya, lycoris")
    if to != "lora" and (rank is not None or energy is not None or uniform_rank or names is not None):
        raise ValueError("--rank, --energy, --uniform-rank and --names are for --to lora; all others are exact.")
    if component is not None and names is None and to not in ("kohya", "lycoris"):
        raise ValueError("--component is for one file of a diffusion tool: --to lora with --names, kohya or lycoris.")
    part: Any = component
    if to in ("kohya", "lycoris"):
        from isotune.files.diffusion.rotations import export_rotation

        form: Any = to
        count = export_rotation(directory, output, form, base=base, component=part, trust_remote_code=trust_remote_code)
        say(f"wrote {output}: {count} layers, exact")
        return
    if to == "peft":
        from isotune.files.export_peft import export_peft
        from isotune.files.export_runs import only_adapter

        count = export_peft(only_adapter(directory), output, base=base, trust_remote_code=trust_remote_code)
        say(f"wrote {output}: {count} layers, exact")
        return
    if names is not None:
        if uniform_rank:
            raise ValueError("--names goes without --uniform-rank: all layers have one rank there.")
        from isotune.files.diffusion.lora import export_lora_file

        kept: Any = names
        report = export_lora_file(
            directory,
            output,
            kept,
            base=base,
            component=part,
            rank=rank,
            energy=energy,
            trust_remote_code=trust_remote_code,
        )
        say(f"wrote {output}: {report}")
        return
    if to == "merged":
        from isotune.files.export_merged import export_merged
        from isotune.files.export_runs import only_adapter

        export_merged(only_adapter(directory), output, base=base, trust_remote_code=trust_remote_code)
        say(f"wrote {output}")
        return
    from isotune.files.adapter import CONFIG_FILE

    export = _export_one if (Path(directory) / CONFIG_FILE).is_file() else _export_runs
    options = {"rank": rank, "energy": energy, "uniform_rank": uniform_rank}
    export(directory, output, base=base, trust_remote_code=trust_remote_code, **options)


def _export_one(directory: str, output: str, **options: Any) -> None:
    from isotune.files.export_lora import export_lora
    from isotune.files.lora_servers import describe_obstacles

    report = export_lora(directory, output, **options)
    if report.error:
        width = max(len(layer.name) for layer in report.layers)
        for layer in report.layers:
            say(f"{layer.name:{width}}  rank {layer.rank:4}  error {layer.error:.2e}")
    say(f"wrote {output}: {report}")
    say(describe_obstacles(output))


def _export_runs(directory: str, output: str, **options: Any) -> None:
    from isotune.files.export_runs import export_lora_runs

    result = export_lora_runs(directory, output, **options)
    for name, report in result.written.items():
        say(f"wrote {output}/{name}: {report}")
    for name in result.skipped:
        say(f"{output}/{name} was there already")
    for name, reason in result.failed.items():
        say(f"failed {directory}/{name}: {reason}", err=True)
    if result.failed:
        raise typer.Exit(1)
