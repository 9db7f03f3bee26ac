"""The score of each method of a comparison over its trainable parameters, light and dark, for the README.

    python benchmarks/front.py benchmarks/results/docstrings -o docs/images/front

writes front-light.svg and front-dark.svg. The line joins the methods that no other beats in both; bars are the standard
error over the seeds. Methods without trainable parameters beside the head, and full fine-tuning, stand in the caption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from isotune.methods import METHODS
from isotune.report.columns import pareto
from isotune.report.results import read

INK = {"light": ("#1f2328", "#8c959f"), "dark": ("#e6edf3", "#7d8590")}
"""Of text and of what lies behind it."""
OURS, OTHERS = {"light": "#4051b5", "dark": "#9fa8ff"}, {"light": "#57606a", "dark": "#8b949e"}
LEFT = ("PSOFT-SO", "OFT", "BOFT", "HRA", "LoRA", "LoRA-XS")
"""Labels that would lie on another to the right of their point."""


def picture(folder: Path, output: Path, theme: str) -> None:
    """Draw one comparison."""
    comparison = read(folder)
    points = []
    for variant in comparison.variants:
        cost, score = variant.average("adapter_parameters"), variant.mean
        if cost and score is not None and variant.method["name"] != "full":
            points.append((cost, 100 * score, variant))
    front = pareto(points, higher_is_better=comparison.higher_is_better)
    ink, faint = INK[theme]
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "isotune", "font.size": 11})
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color=OURS[theme], alpha=0.35, linewidth=6)
    for x, y, variant in points:
        own = variant.method["name"].partition("_so")[0] in METHODS
        color = (OURS if own else OTHERS)[theme]
        axes.errorbar(x, y, 100 * (variant.standard_error or 0), fmt="o", color=color, capsize=2, markersize=7)
        name = variant.title.split(" r")[0].split(" b")[0].removeprefix("PEFT ")
        offset, side = ((-8, 4), "right") if name in LEFT else ((8, -4), "left")
        axes.annotate(name, (x, y), offset, textcoords="offset points", ha=side, color=color, weight="bold")
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters of the adapter", color=ink)
    axes.set_ylabel("test accuracy, %", color=ink)
    axes.set_xticks([2e4, 5e4, 1e5, 2e5, 4e5], ["20k", "50k", "100k", "200k", "400k"])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.tick_params(colors=ink)
    axes.grid(color=faint, alpha=0.25)
    for side in axes.spines.values():
        side.set_visible(False)
    path = output.with_name(f"{output.name}-{theme}.svg")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    print(f"wrote {path}, {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a folder that isotune compare wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="without -light.svg")
    given = parser.parse_args()
    for theme in INK:
        picture(given.results, given.output, theme)


if __name__ == "__main__":
    main()
