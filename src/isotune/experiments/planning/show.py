"""An estimate as a table for the terminal."""

from __future__ import annotations

from isotune.experiments.planning.estimate import Estimate
from isotune.experiments.planning.setting import ACCELERATORS


def to_text(found: Estimate) -> str:
    """An estimate as a table with its assumptions."""
    setting = found.setting
    options = " ".join(f"{key}={value}" for key, value in setting.options.items())
    share = found.trained_parameters / found.base_parameters
    head = [
        f"{setting.model} ({found.architecture}), {setting.method} {options}".rstrip(),
        f"{setting.devices} × {setting.accelerator if not setting.flops else 'device'}, {setting.sharding}, "
        f"{found.dtype}, quantisation {setting.quantization}, "
        f"batch {setting.batch} × {found.tokens // setting.batch} tokens a device"
        + (", checkpointing" if setting.checkpointing else ""),
        "",
        f"base parameters      {found.base_parameters:>18,}",
        f"trainable parameters {found.trained_parameters:>18,}   {share:.3%} of the base",
        f"adapter file         {size(found.adapter_file):>18}",
        "",
        "memory of one device",
    ]
    rows = [f"  {name:<27}{size(count):>11}" for name, count in found.memory.items()]
    rows += [f"  {'':─<38}", f"  {'together':<27}{size(found.total):>11}{_fits(found)}", ""]
    notes = []
    if found.adapter_activations:
        notes.append(f"of what is kept for backward, the adapter's part by formula: {size(found.adapter_activations)}")
    if found.paper_activations is not None:
        notes.append(
            f"kept for backward by the paper's Table 9, which keeps attention scores: {size(found.paper_activations)}"
        )
    step = [
        f"operations of a step {found.operations / 1e12:>17.2f}T",
        f"time of a step       {_seconds(found.seconds):>18}   {found.tokens_per_second:,.0f} tokens a second in all",
    ]
    if setting.devices > 1:
        step.append(f"sent by a device     {size(found.sent):>18}   a step")
    return "\n".join(
        [*head, *rows, *notes, "", *step, "", "assumptions", *(f"  · {line}" for line in found.assumptions)]
    )


def _fits(found: Estimate) -> str:
    if found.setting.flops:
        return ""
    memory = ACCELERATORS[found.setting.accelerator].memory
    return f"   of {size(memory)}" + ("" if found.total <= memory else ", too much")


def size(count: float) -> str:
    """A number of bytes in the largest binary unit of which there is one."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1023.5:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
