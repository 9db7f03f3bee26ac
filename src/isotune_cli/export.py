"""Exporting adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isotune_cli.shared import Base, Out, Result, Trust, say

_ONE_FILE = ("kohya", "onetrainer", "lycoris")
"""Tools for whose rotations there is one file."""


def export_adapter(
    directory: Annotated[
        str,
        typer.Argument(help="The folder of an adapter, or of a run; with --to lora also one that holds several."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="What is written: lora, the folder of an ordinary LoRA of PEFT; merged, a plain model; peft, PEFT's "
            "own OFT or BOFT; kohya, onetrainer or lycoris, a rotation as one file."
        ),
    ],
    output: Out,
    base: Base = None,
    rank: Annotated[
        int | None, typer.Option(help="The largest LoRA rank; an update of a higher one is approximated.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="The share of each layer's update to keep, such as 0.999, which gives its LoRA rank."),
    ] = None,
    uniform_rank: Annotated[bool, typer.Option("--uniform-rank", help="Fill all layers up to one LoRA rank.")] = False,
    names: Annotated[
        str | None,
        typer.Option(help="Write one LoRA file of a model of diffusers, with the names of diffusers or of kohya."),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Which one of its pipeline the base of one file is: text_encoder, text_encoder_1 or _2."),
    ] = None,
    trust_remote_code: Trust = False,
) -> Result:
    """Write an adapter, or all checkpoints in a folder, in a form that needs no isotune."""
    known = ("lora", "merged", "peft", *_ONE_FILE)
    if to not in known:
        raise ValueError(f"--to {to} is not one of {', '.join(known)}")
    if to != "lora" and (rank is not None or energy is not None or uniform_rank or names is not None):
        raise ValueError("--rank, --energy, --uniform-rank and --names are for --to lora; all others are exact.")
    if component is not None and names is None and to not in _ONE_FILE:
        raise ValueError(
            f"--component is for one file of a diffusion tool: --to lora with --names, or --to {', '.join(_ONE_FILE)}."
        )
    part: Any = component
    if to in _ONE_FILE:
        from isotune.files.diffusion.rotations import export_rotation

        form: Any = to
        count = export_rotation(directory, output, form, base=base, component=part, trust_remote_code=trust_remote_code)
        return _wrote(output, f"{count} layers, exact")
    if to == "peft":
        from isotune.files.export_peft import export_peft
        from isotune.files.export_runs import only_adapter

        count = export_peft(only_adapter(directory), output, base=base, trust_remote_code=trust_remote_code)
        return _wrote(output, f"{count} layers, exact")
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
        return _wrote(output, str(report))
    if to == "merged":
        from isotune.files.export_merged import export_merged
        from isotune.files.export_runs import only_adapter

        export_merged(only_adapter(directory), output, base=base, trust_remote_code=trust_remote_code)
        return _wrote(output, "merged into the base model")
    from isotune.files.adapter import CONFIG_FILE

    export = _export_one if (Path(directory) / CONFIG_FILE).is_file() else _export_runs
    options = {"rank": rank, "energy": energy, "uniform_rank": uniform_rank}
    return export(directory, output, base=base, trust_remote_code=trust_remote_code, **options)


def _wrote(output: str, what: str) -> Result:
    return Result(f"wrote {output}: {what}", {"wrote": {output: what}})


def _export_one(directory: str, output: str, **options: Any) -> Result:
    from isotune.files.export_lora import export_lora
    from isotune.files.lora_servers import describe_obstacles

    report = export_lora(directory, output, **options)
    lines = []
    if report.error:
        width = max(len(layer.name) for layer in report.layers)
        lines = [f"{layer.name:{width}}  rank {layer.rank:4}  error {layer.error:.2e}" for layer in report.layers]
    served = describe_obstacles(output)
    lines += [f"wrote {output}: {report}", served]
    return Result("\n".join(lines), {"wrote": {output: str(report)}, "serving": served})


def _export_runs(directory: str, output: str, **options: Any) -> Result:
    from isotune.files.export_runs import export_lora_runs

    result = export_lora_runs(directory, output, **options)
    wrote = {f"{output}/{name}": str(report) for name, report in result.written.items()}
    skipped = [f"{output}/{name}" for name in result.skipped]
    failed = {f"{directory}/{name}": reason for name, reason in result.failed.items()}
    lines = [f"wrote {name}: {report}" for name, report in wrote.items()]
    lines += [f"{name} was there already" for name in skipped]
    for name, reason in failed.items():
        say(f"failed {name}: {reason}", err=True)
    return Result("\n".join(lines), {"wrote": wrote, "skipped": skipped, "failed": failed}, failed=bool(failed))
