"""The results as the section of docs/evidence/speed.md, so that no figure is typed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_bench.table import has_rows, rows_of, shown

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
_UNSHOWN = ("environment", "errors", "complete", "seconds", "command", "data", "step", "skipped", "output", "how")
_COLUMNS = {
    "ratio": "ratio",
    "ms": "ms",
    "host_ms": "of it launching, ms",
    "gpu_ms": "GPU alone, ms",
    "kernels": "kernels",
    "tokens_per_s": "tokens/s",
    "peak_gib": "peak GiB beyond the model",
    "evaluations_after_first_token": "evaluations after the first token",
    "rank": "r",
    "seconds": "s",
    "sine": "sine of the angle to the true subspace",
    "mib": "MiB beyond the weight",
}


def markdown(results: Mapping[str, Any]) -> str:
    """Each complete piece that measures time, as a table or a line.

    Args:
        results: as `gpu_bench.table.table` takes them.
    """
    parts: list[str] = []
    pieces = results["pieces"]
    for name, piece in pieces.items():
        if not piece["complete"] or name.split("/")[0] in ("right", "profile", "learning"):
            continue
        about = [f"{k.replace('_', ' ')} {shown(v)}" for k, v in piece.items() if k not in _UNSHOWN and not has_rows(v)]
        about += [str(piece["how"])] if "how" in piece else []
        parts.append(
            f"`{name}`: {piece['environment']['card']}, torch {piece['environment']['torch']}; {', '.join(about)}"
        )
        for key, rows in piece.items():
            if key not in _UNSHOWN and has_rows(rows):
                parts.append(_table(rows_of(name, rows, pieces)))
        if piece["errors"]:
            parts.append(f"Not measured: {', '.join(piece['errors'])}.")
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    keys = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows.values())]
    lines = [["", *(_COLUMNS[key] for key in keys)], ["---"] * (len(keys) + 1)]
    lines += [[name, *(shown(row.get(key)) for key in keys)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(page: str, results: Mapping[str, Any]) -> str:
    """A page with the measured section between its two marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"the page has no section between {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}"


def write(page: Path, results: Mapping[str, Any]) -> None:
    """Make the section of a page anew."""
    page.write_text(written(page.read_text(encoding="utf-8"), results), encoding="utf-8")
