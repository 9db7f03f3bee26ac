"""A result as a table for the terminal and as a small chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HEADINGS = {"accuracy": "accuracy", "matthews_correlation": "Matthews", "pearson": "Pearson", "loss": "loss"}
_AXES = {
    "accuracy": "test accuracy",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "loss": "test loss",
}


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The chosen run of each method, after what needs no training; each a row of the table."""
    metric = result["metric"]
    found: list[dict[str, Any]] = []
    if metric == "accuracy" and "majority_accuracy" in result["data"]:
        found.append({"name": "majority class", "score": result["data"]["majority_accuracy"]})
    found += [
        {"name": "untrained head", "score": entry["untrained"][metric]}
        for entry in result["runs"]
        if "untrained" in entry and entry["chosen"]
    ]
    for entry in result["runs"]:
        if entry["chosen"]:
            method = entry["method"]
            name = "head alone" if method["name"] == "head" else method["name"].upper().replace("_", " ")
            found.append(
                {
                    "name": f"{name} r={method['r']}" if "r" in method else name,
                    "score": entry["test"][metric],
                    "parameters": entry["trainable_parameters"],
                    "bytes": entry["adapter_bytes"],
                    "seconds": entry["seconds"],
                    "lr": entry["lr"],
                }
            )
    main = found[-1]["name"]
    for name, label in (("reloaded", "reloaded in a new process"), ("merged", "merged into the base")):
        if name in result.get("saved", {}):
            found.append({"name": f"{main}, {label}", "score": result["saved"][name][metric]})
    return found


def table(result: dict[str, Any]) -> str:
    """The result as lines of text, one row a method."""
    percent = result["metric"] == "accuracy"
    head = ("", _HEADINGS[result["metric"]], "trainable", "file", "time", "lr")
    lines = [
        head,
        *(
            (
                row["name"],
                f"{row['score']:.1%}" if percent else f"{row['score']:.4f}",
                f"{row['parameters']:,}" if "parameters" in row else "",
                f"{row['bytes'] / 1024:,.0f} KiB" if "bytes" in row else "",
                f"{row['seconds']:.0f} s" if "seconds" in row else "",
                f"{row['lr']:g}" if "lr" in row else "",
            )
            for row in rows(result)
        ),
    ]
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns of text, the first line set off from the others and the first column to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def chart(result: dict[str, Any], path: Path) -> None:
    """Draw the table's scores as bars into a PNG of 1,280 × about 640 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [row for row in rows(result) if "parameters" in row or row["name"] == "majority class"]
    metric = _AXES[result["metric"]]
    figure = Figure(figsize=(8, 1.2 + 0.7 * len(found)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state: charts may be drawn in any process
    axes = figure.subplots()
    colours = ["#b9c0c9"] * (len(found) - 1) + ["#2f6db5"]
    bars = axes.barh([row["name"] for row in found], [row["score"] for row in found], color=colours)
    for bar, row in zip(bars, found, strict=True):
        score = f"{row['score']:.1%}" if result["metric"] == "accuracy" else f"{row['score']:.3f}"
        note = f"  {score}" + (f"   {row['parameters']:,} trainable parameters" if "parameters" in row else "")
        # Inside a long bar, beside a short one, so the text never leaves the axes.
        long = row["score"] > 0.5
        axes.text(
            row["score"] - 0.01 if long else row["score"],
            bar.get_y() + bar.get_height() / 2,
            note.strip() if long else note,
            va="center",
            ha="right" if long else "left",
            color="white" if long and row is found[-1] else "#1d2733",
            fontsize=11,
        )
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *(row["score"] for row in found)), 1)
    axes.set_xlabel(metric)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
