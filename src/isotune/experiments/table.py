"""What methods come to, as one table for the terminal and as a small chart."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isotune.experiments import scores
from isotune.experiments.chart import draw
from isotune.experiments.records import number
from isotune.experiments.text import aligned, printable

Row = Mapping[str, Any]

_COLUMNS = (
    ("adapter", "adapter_parameters", "{:,.0f}", 1),
    ("trained", "trainable_parameters", "{:,.0f}", 1),
    ("file", "adapter_bytes", "{:,.0f} KiB", 1024),
    ("time", "train_seconds", "{:,.0f} s", 1),
    ("peak", "peak_memory_bytes", "{:,.0f} MiB", 2**20),
    ("kept", "kept_bytes", "{:,.1f} MiB", 2**20),
    ("forgetting", "forgetting", "{:+.3f}", 1),
)
"""Heading, key of a row, how a number is written, and in which unit."""
WIDTH = 100
_LEFT_OUT = ("file", "peak", "adapter", "kept", "time")
"""The columns that are left out one after the other where a line would have more than WIDTH characters."""
_MEANT = {
    "adapter": "its parameters",
    "trained": "all that are trained, as a new head's",
    "peak": "most memory",
    "kept": "what a batch keeps for backward",
    "forgetting": "the change on text that was not trained on{unit}",
}
"""What a heading stands for, where it does not say."""


def table(result: Mapping[str, Any]) -> str:
    """What an experiment came to, as `Schedule.result` makes it, as lines of text, and after them what failed.

    What a method has not measured is a dash, and a column that none has is left out.
    """
    metric, rows = result["metric"], _rows(result)
    to = next((row["difference"]["to"] for row in rows if row.get("difference")), "")
    measures = (heading for heading, _, _, _ in _COLUMNS)
    lines = [("", metric.replace("_", " "), f"less {to}", "seeds", "lr", *measures)]
    for row in rows:
        seeds, lr = row.get("seeds"), row.get("lr")
        apart = _difference(metric, row.get("difference"))
        cells = [str(row["title"]), _score(metric, row) + _interval(metric, row), apart]
        cells.append("" if seeds is None else str(seeds))
        cells.append("" if lr is None else f"{lr:g}" + ("*" if row.get("lr_at_border") else ""))
        for _, key, form, unit in _COLUMNS:
            value = row.get(key)
            none = "" if row.get("mean") is None or "label" not in row else "–"
            cells.append(none if value is None else form.format(round(value / unit, 3) + 0.0))
        lines.append(tuple(cells))
    used = [i for i in range(len(lines[0])) if i < 2 or any(line[i] not in ("", "–") for line in lines[1:])]
    head, *body = _aligned(lines, used)
    for heading in _LEFT_OUT:
        if len(head) > WIDTH and (column := lines[0].index(heading)) in used:
            used.remove(column)
            head, *body = _aligned(lines, used)
    shown = [head, "-" * len(head), *body]
    measured = next((f", in {row['forgetting_unit']}" for row in rows if row.get("forgetting_unit")), "")
    told = [f"{name}: {_MEANT[name]}".format(unit=measured) for i in used if (name := lines[0][i]) in _MEANT]
    told += ["in brackets: 95 % interval"] if any("(" in line[i] for line in lines[1:] for i in (1, 2)) else []
    shown += textwrap.wrap("; ".join(told), WIDTH)
    if border := [str(row["title"]) for row in rows if row.get("lr_at_border")]:
        more = {None: "give train.lr more rates", "auto": "--lr-runs allows more rates"}
        beyond = more.get(result.get("lr_search"), "--lr-search auto searches on")
        shown.append(f"* best rate at the border for {', '.join(border)}, a better one may lie beyond: {beyond}")
    return "\n".join([*shown, *(f"{row['title']} failed: {row['failed']}" for row in rows if row.get("failed"))])


def _aligned(lines: Sequence[tuple[str, ...]], used: Sequence[int]) -> list[str]:
    return aligned([[printable(line[i]) for i in used] for line in lines], "<" + ">" * (len(used) - 1))


def _rows(result: Mapping[str, Any]) -> list[Row]:
    """The rows of an experiment: what needs no training, its methods, and what a training has saved."""
    metric, methods = result["metric"], result["rows"]
    majority = number(result["data"].get("majority_accuracy"))
    rows: list[Row] = []
    if metric == "accuracy" and majority is not None:
        rows.append({"title": "majority class", "mean": majority})
    # That of the head, where there is one: what starts from a trained head has that head's score before training.
    untrained = [row for row in methods if row.get("untrained_score") is not None]
    if untrained:
        first = max(untrained, key=lambda row: (row.get("method", {}).get("name") == "head", row.get("seeds") or 0))
        title = f"untrained {'head' if 'majority_accuracy' in result['data'] else 'model'}"
        rows.append({"title": title, "mean": first["untrained_score"]})
    rows += methods
    for name, found in result.get("saved", {}).items():
        rows.append({"title": f"{methods[-1]['title']}, {name}", "mean": found[metric]})
    return rows


def _score(metric: str, row: Row) -> str:
    if row["mean"] is None:
        return "failed" if row.get("failed") else "not done"
    return scores.score(metric, row["mean"], row.get("standard_error"))


def _interval(metric: str, row: Row) -> str:
    """The ends of the interval of a single seed's score over the draw of the test examples."""
    found = row.get("interval")
    return "" if found is None else " ({} to {})".format(*(scores.plain(metric, end) for end in found))


def _difference(metric: str, found: Mapping[str, float] | None) -> str:
    """With the ends of its interval, and without its unit, for which a line has no room."""
    if found is None:
        return ""
    mean, low, high = (scores.plain(metric, found[key], "+") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def chart(result: Mapping[str, Any], path: Path) -> None:
    """Draw the scores of the methods of an experiment, as `Schedule.result` makes it; as `draw`."""
    rows = [{**row, "score": _score(result["metric"], row)} for row in result["rows"] if row["mean"] is not None]
    draw(result["metric"], result["data"], rows, path)
