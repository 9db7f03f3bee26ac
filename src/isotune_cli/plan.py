"""Estimating memory and time."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Result


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a Hub name or package:NAME; only its config.json is read.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the method, such as oft_block_size=32.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="The method, as a recipe names it: psoft, oft, hra, lora_xs, oplora, lora, full, …")
    ] = "psoft",
    rank: Annotated[int | None, typer.Option(help="The rank r of the method.")] = None,
    devices: Annotated[int, typer.Option(help="How many devices compute batches side by side.")] = 1,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="How devices divide what is kept: ddp, zero1, zero2, zero3 or fsdp. By default several have ddp."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. By default it is the model's own.")
    ] = None,
    quantization: Annotated[
        str, typer.Option(help="How the base model is quantised: none, nf4, nf4-double, int8 or int4.")
    ] = "none",
    optimizer: Annotated[str, typer.Option(help="The optimiser: adamw, adamw-8bit or sgd.")] = "adamw",
    batch: Annotated[int, typer.Option(help="How many sequences one device computes in a step.")] = 1,
    sequence: Annotated[int, typer.Option(help="How many tokens a sequence has.")] = 2048,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations again in the backward pass.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="The device: h200, h100, a100, l40s or l4.")] = "h100",
    flops: Annotated[
        float | None, typer.Option(help="How many operations a second another device computes, such as 300e12.")
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(help="The share of its speed that a device reaches. By default it is as measured, or else 0.4."),
    ] = None,
) -> Result:
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
    return Result(to_text(found), found.to_dict())
