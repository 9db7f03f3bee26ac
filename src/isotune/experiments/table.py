"""What methods come to, as one table for the terminal and as a small chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isotune.experiments.chart import draw
from isotune.experiments.records import Training, number
from isotune.experiments.registry import entry
from isotune.experiments.text import aligned, printable

Row = Mapping[str, Any]

_COLUMNS = (
    ("adapter", "adapter_parameters", "{:,.0f}", 1),
    ("trained", "trainable_parameters", "{:,.0f}", 1),
    ("file", "adapter_bytes", "{:,.0f} KiB", 1024),
    ("time", "train_seconds", "{:,.0f} s", 1),
    ("peak", "peak_memory_bytes", "{:,.0f} MiB", 2**20),
    ("kept", "kept_bytes", "{:,.1f} MiB", 2**20),
)
"""Heading, key of a row, how a number is written, and in which unit."""


def table(metric: str, rows: Sequence[Row]) -> str:
    """Methods as lines of text, one each as `comparison.json` holds them, then what failed.

    What a row does not have is left empty, and a column that none has is left out.
    """
    lines = [("", metric.replace("_", " "), "seeds", "lr", *(heading for heading, _, _, _ in _COLUMNS))]
    for row in rows:
        seeds, lr = row.get("seeds"), row.get("lr")
        cells = [str(row["label"]), shown_score(metric, row), "" if seeds is None else str(seeds)]
        cells.append("" if lr is None else f"{lr:g}" + ("*" if row.get("lr_at_border") else ""))
        for _, key, form, unit in _COLUMNS:
            value = row.get(key)
            cells.append("" if value is None else form.format(value / unit))
        lines.append(tuple(cells))
    used = [i for i in range(len(lines[0])) if i < 2 or any(line[i] for line in lines[1:])]
    head, *body = aligned([[printable(line[i]) for i in used] for line in lines], "<" + ">" * (len(used) - 1))
    shown = [head, "-" * len(head), *body]
    if any(row.get("lr_at_border") for row in rows):
        shown.append("* the best of the rates tried is the lowest or the highest; a better one may lie beyond")
    return "\n".join([*shown, *(f"{row['label']} failed: {row['failed']}" for row in rows if row.get("failed"))])


def shown_score(metric: str, row: Row) -> str:
    """The score of a row as people read it, with its standard error where there are several seeds."""
    if row["mean"] is None:
        return "failed" if row.get("failed") else "not done"
    scale, digits, unit = (100, 1, " %") if metric == "accuracy" else (1, 3, "")
    error = row.get("standard_error")
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * row['mean']:.{digits}f}{spread}{unit}"


def of_training(training: Training) -> str:
    """The table of a training."""
    return table(training.metric, training_rows(training))


def training_rows(training: Training) -> list[Row]:
    """The rows of a training: what needs no training, each method at its best rate, and the saved adapter."""
    metric = training.metric
    majority = number(training.data.get("majority_accuracy"))
    chosen = [run for run in training.records if run.chosen and run.score is not None]
    rows: list[Row] = []
    if metric == "accuracy" and majority is not None:
        rows.append({"label": "majority class", "mean": majority})
    rows += [{"label": "untrained head", "mean": run.untrained[metric]} for run in chosen if metric in run.untrained]
    title = ""
    for run in chosen:
        name = str(run.method.get("name"))
        title = "head alone" if name == "head" else entry(name).title_of(run.method)
        measures = {key: getattr(run, key) for _, key, _, _ in _COLUMNS}
        rows.append({"label": title, "mean": run.score, "lr": run.lr, **measures})
    for name, how in (("reloaded", "reloaded in a new process"), ("merged", "merged into the base")):
        if metric in training.saved.get(name, {}):
            rows.append({"label": f"{title}, {how}", "mean": training.saved[name][metric]})
    return rows


def chart(training: Training, path: Path) -> None:
    """Draw the scores of a training, each with its interval over the test examples; as `draw`."""
    rows = [row for row in training_rows(training) if "trainable_parameters" in row]
    runs = [run for run in training.records if run.chosen and run.score is not None]
    shown = [
        {**row, "title": row["label"], "score": shown_score(training.metric, row), "interval": run.interval}
        for row, run in zip(rows, runs, strict=True)
    ]
    draw(training.metric, training.data, shown, path)
