"""Taking an adapter out of a fine-tuned checkpoint."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune_cli.shared import Result, Trust

if TYPE_CHECKING:
    from isotune.tools.extraction import ExtractedLayer, Extraction, Outside


def extract_adapter(
    base: Annotated[str, typer.Argument(help="The base model: a folder, a Hub name or package:NAME.")],
    tuned: Annotated[str, typer.Argument(help="The model that was fine-tuned from it, given in the same ways.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options of the adapter, such as oft_block_size=32."),
    ] = None,
    method: Annotated[str, typer.Option("--as", help="What the adapter is: oft, psoft or hra.")] = "oft",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The new folder to write. Without it, only the table is shown."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "--r", help="The rank r of PSOFT, or the number of HRA's reflections.")
    ] = None,
    residual: Annotated[
        str, typer.Option(help="What becomes of what the adapter leaves: lora keeps it as a LoRA, drop does not.")
    ] = "drop",
    residual_rank: Annotated[int | None, typer.Option(help="The largest rank of that LoRA; 8 if not given.")] = None,
    trust_remote_code: Trust = False,
) -> Result:
    """Find the adapter that is nearest to a fine-tuned model, and say how near it is."""
    from isotune.experiments.planning.setting import parse_options
    from isotune.methods.checks import require_choice
    from isotune.tools.extraction import METHODS, extract

    require_choice("--as", method, METHODS)
    require_choice("--residual", residual, ("lora", "drop"))
    if rank is not None and method == "oft":
        raise ValueError("--rank is for psoft and hra; OFT has oft_block_size=32.")
    if residual_rank is not None and residual != "lora":
        raise ValueError("--residual-rank is for --residual lora, which keeps the residual.")
    given = parse_options(options or ())
    if rank is not None and given.setdefault("r", rank) != rank:
        raise ValueError(f"--rank {rank} and r={given['r']} are both given; leave one of them out.")
    try:
        config = METHODS[method](**given)
    except TypeError as error:  # an option that the method does not have
        raise ValueError(str(error)) from None
    kept: Any = residual
    found = extract(
        base,
        tuned,
        config,
        output,
        residual=kept,
        residual_rank=8 if residual_rank is None else residual_rank,
        trust_remote_code=trust_remote_code,
    )
    lines = _table(found, with_residual=residual == "lora")
    if output is not None:
        lines.append(f"wrote {output}: {found.method}, {len(found.layers)} layers, error {found.error:.1%}")
    return Result("\n".join(lines), {"wrote": output, **found.to_dict()})


def _table(found: Extraction, *, with_residual: bool) -> list[str]:
    """A line for each layer, one for all of them, and what changed outside of them."""
    width = max(len(layer.name) for layer in found.layers)
    head = f"{'layer':{width}}  {'change':>7}  {found.method:>8}" + (f"  {'residual':>8}" if with_residual else "")
    lines = [f"{head}  {'left':>7}"]
    lines += [_line(layer, width, with_residual=with_residual) for layer in (*found.layers, found.whole)]
    lines += ["change: ‖W' − W‖ / ‖W‖; then shares of ‖W' − W‖²; left: the error ‖W' − …‖ / ‖W' − W‖"]
    lost = [one for one in found.outside if not one.kept]
    if kept := len(found.outside) - len(lost):
        lines.append(f"outside these layers, {kept} changed tensors are kept in the adapter's folder")
    if lost:
        lines.append(
            f"outside these layers, {len(lost)} changed tensors are left out (modules_to_save, bias keep them):"
        )
        lines += _grouped(lost)
    return lines


def _grouped(lost: list[Outside]) -> list[str]:
    """A line for each tensor, or for all of one name in layers of different numbers."""
    groups: dict[tuple[str, bool], list[Outside]] = {}
    for one in lost:
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", one.name), one.change is None), []).append(one)
    lines = []
    for (name, alone), own in groups.items():
        change = math.hypot(*(one.change or 0.0 for one in own))
        how = "only in one of the models, or of another shape" if alone else f"changed by {change:.3g}"
        times = f"{len(own)} tensors, " if len(own) > 1 else ""
        lines.append(f"  {name}  {times}{sum(one.size for one in own):,} numbers, {how}")
    return lines


def _line(layer: ExtractedLayer, width: int, *, with_residual: bool) -> str:
    change = layer.change or 1.0
    shares = [1 - (layer.left / change) ** 2 if layer.change else 0.0]
    if with_residual:
        shares.append((layer.left / change) ** 2 - (layer.missing / change) ** 2)
    middle = "".join(f"  {share:8.1%}" for share in shares)
    return f"{layer.name:{width}}  {layer.change / (layer.weight or 1.0):7.2%}{middle}  {layer.missing / change:7.1%}"
