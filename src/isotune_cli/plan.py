"""Estimating memory and time."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from isotune_cli.shared import Json, say


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
    utilization: Annotated[
        float | None,
        typer.Option(help="Share of its speed that a device reaches. Default: as measured on it, else 0.4."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory and time of a fine-tuning from the model's configuration alone."""
    from isotune.experiments.planning.estimate import estimate
    from isotune.experiments.planning.setting import Setting, parse_options
    from isotune.experiments.planning.show import to_text

    setting = Setting(
        model=model,
        method=method,
        options={**({} if rank is None else {"r": rank}), **parse_options(options or ())},
        devices=devices,
        sharding=sharding,
        dtype=dtype,
        quantization=quantization,
        optimizer=optimizer,
        batch=batch,
        sequence=sequence,
        checkpointing=checkpointing,
        accelerator=accelerator,
        flops=flops,
        utilization=utilization,
    )
    found = estimate(setting)
    say(json.dumps(found.to_dict(), indent=2) if as_json else to_text(found))
