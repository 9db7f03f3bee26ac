"""Draw what each method does to the inputs of a layer, light and dark, from adapters of the library.

    python docs_tools/turns.py docs/images/turns

writes turns-light.svg and turns-dark.svg: for a layer of 32 inputs the matrix that they are multiplied with, in the
basis of the weight's right singular vectors for methods of the principal subspace.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import isotune
from isotune.adapter.subspace import SubspaceAdapter

INK = {"light": ("#1f2328", "#8c959f", "#3949ab"), "dark": ("#e6edf3", "#7d8590", "#9fa8ff")}
"""Of text, of directions that are left alone, and of those that are turned."""
WIDTH = 32
METHODS = {
    "PSOFT, r = 8": ("rotates the 8 strongest directions", isotune.PsoftConfig(r=8)),
    "LoRA-XS, r = 8": ("mixes the 8 strongest directions", isotune.LoraXsConfig(r=8, init_std=0.3)),
    "OFT, b = 8": ("rotates inputs within blocks of 8", isotune.OFTConfig(oft_block_size=8)),
    "BOFT, b = 4, m = 3": (
        "blocks of 4, joined 3 times",
        isotune.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3),
    ),
    "GOFT, qGOFT": ("turns pairs, in a tree", isotune.GOFTConfig()),
    "HRA, r = 2": ("reflects all inputs twice", isotune.HRAConfig(r=2)),
}


def multiplied(config: isotune.PsoftConfig) -> tuple[torch.Tensor, bool]:
    """The matrix on the inputs after some training, and whether it stands in the basis of the singular vectors."""
    torch.manual_seed(3)
    config.target_modules = ["0"]
    model = isotune.get_peft_model(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)), config)
    (layer,) = (module for module in model.modules() if hasattr(module, "adapter"))
    adapter = layer.adapter("default")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25 * torch.randn_like(parameter))
        own = adapter.matrix().double()
    matrix = torch.eye(WIDTH, dtype=torch.float64)
    matrix[: len(own), : len(own)] = own
    return matrix, isinstance(adapter, SubspaceAdapter)


def panel(axes: Axes, title: str, theme: str) -> None:
    """One method."""
    text, config = METHODS[title]
    ink, faint, color = INK[theme]
    matrix, principal = multiplied(config)
    changed = (matrix - torch.eye(WIDTH)).abs()
    shades = LinearSegmentedColormap.from_list("shades", [color + "00", color])
    axes.imshow(changed.clamp(max=0.5).sqrt(), cmap=shades, vmin=0, vmax=0.5**0.5, interpolation="none")
    alone = [i for i in range(WIDTH) if changed[i].max() < 1e-9 and changed[:, i].max() < 1e-9]
    axes.plot(alone, alone, "s", color=faint, markersize=2.2)
    axes.set_title(title, color=ink, weight="bold", fontsize=11)
    axes.set_xlabel(text, color=ink, fontsize=9)
    axes.set_ylabel("singular directions" if principal else "inputs", color=faint, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(faint)
        side.set_alpha(0.5)


def main(output: Path) -> None:
    """Both themes."""
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "isotune", "svg.image_inline": True})
    for theme in INK:
        figure = Figure(figsize=(8, 5.8), layout="constrained")
        for axes, title in zip(figure.subplots(2, 3).flat, METHODS, strict=True):
            panel(axes, title, theme)
        path = output.with_name(f"{output.name}-{theme}.svg")
        figure.savefig(path, transparent=True, metadata={"Date": None})
        print(f"wrote {path}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
