"""The results as a short text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.experiments.text import aligned

_ABOUT = ("environment", "errors", "complete", "seconds", "output", "command", "data", "step", "skipped")
"""What no reader of the table looks for; the file has it."""
_UNSHOWN = ("top", "rounds", "lr_tried", "failed")


def table(results: Mapping[str, Any]) -> str:
    """The figures of a results file, piece by piece, and every error.

    A race of steps has the kernels and the GPU's own time of its variants beside it, where the profile has them.

    Args:
        results: `{"pieces": {name: piece}}` as `gpu_bench.journal.Journal` writes it.
    """
    pieces: Mapping[str, Any] = results["pieces"]
    parts = []
    for name, piece in pieces.items():
        environment = piece["environment"]
        state = "" if piece["complete"] else ", not complete"
        parts.append(
            f"{name}: {environment['card']}, torch {environment['torch']}, {piece.get('seconds', 0):g} s{state}"
        )
        plain = {key: value for key, value in piece.items() if key not in _ABOUT and not has_rows(value)}
        if plain:
            parts.append("  " + ", ".join(f"{key} {shown(value)}" for key, value in plain.items()))
        for key, value in piece.items():
            if key not in _ABOUT and has_rows(value):
                parts += _rows(rows_of(name, value, pieces))
        parts += [f"  skipped: {who}: {why}" for who, why in piece.get("skipped", {}).items()]
        parts += [f"  failed: {who}: {what}" for who, what in piece["errors"].items()]
        parts.append("")
    return "\n".join(parts)


def has_rows(value: Any) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else value
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def rows_of(name: str, rows: Any, pieces: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by their names, those of a race with the profile's figures of the same shape and sizes."""
    named = rows if isinstance(rows, dict) else {row["label"]: {**row, "label": None} for row in rows}
    own = pieces[name]
    if not name.startswith("step/") or own.get("checkpointing") or own.get("batch") != 1:
        return dict(named)
    same = ("shape", "layers", "tokens", "environment")
    found: dict[str, dict[str, Any]] = {}
    for other, piece in pieces.items():
        if other.startswith("profile/") and all(piece.get(key) == own.get(key) for key in same):
            found = piece.get("variants", {})
    extra = {who: {key: row[key] for key in ("gpu_ms", "kernels")} for who, row in found.items()}
    return {who: {**row, **extra.get(who, {})} for who, row in named.items()}


def _rows(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows.values() for key, value in row.items() if value is not None)
    keys = dict.fromkeys(key for key in keys if key not in _UNSHOWN)
    lines = [("", *keys), *((name, *(shown(row.get(key)) for key in keys)) for name, row in rows.items())]
    return ["  " + line.rstrip() for line in aligned(lines, "<" + ">" * len(keys))]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return " × ".join(map(shown, value)) if all(isinstance(one, int) for one in value) else str(len(value))
    return f"{value:,}" if type(value) is int else str(value)
