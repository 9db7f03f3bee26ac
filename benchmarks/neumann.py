"""What a truncated Neumann series would make of the rotations that trained PSOFT adapters have learnt.

    python benchmarks/neumann.py runs/demo/psoft [FOLDER ...] [--terms 5]

For each folder, over its layers: the norm of the generator Q, how far the truncated transform is from orthogonal
(‖NᵀN − I‖_F / √r), and how far from the exact rotation, relative to what that does (‖N − R‖_F / ‖R − I‖_F).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from isotune import PsoftConfig
from isotune.algebra.cayley import CayleyMap
from isotune.algebra.skew import skew_from_vector, skew_order
from isotune.files.adapter import WEIGHTS_FILE
from isotune.files.export_runs import only_adapter


def measured(folder: Path, terms: int) -> dict[str, list[float]]:
    """The three figures of every layer of an adapter."""
    folder = Path(only_adapter(folder))
    config = PsoftConfig.from_pretrained(str(folder))
    found: dict[str, list[float]] = {"‖Q‖": [], "not orthogonal by": [], "off the rotation by": []}
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        if "generator" not in name:
            continue
        vector, rank = tensor.double(), skew_order(tensor.numel())
        exact, series = (CayleyMap(rank, count, scaled=config.scaled_generator) for count in (None, terms))
        rotation, truncated = exact.difference(vector), series.difference(vector)
        eye, norm = torch.eye(rank, dtype=torch.float64), torch.linalg.matrix_norm
        whole = truncated + eye
        for column, value in zip(
            found,
            (
                norm(skew_from_vector(exact.generator(vector), rank), 2),
                norm(whole.T @ whole - eye) / rank**0.5,
                norm(truncated - rotation) / norm(rotation),
            ),
            strict=True,
        ):
            found[column].append(value.item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="an adapter, or a run with one in it")
    parser.add_argument("--terms", type=int, default=5)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        print(folder)
        for title, values in measured(folder, arguments.terms).items():
            mean = sum(values) / len(values)
            print(f"  {title:20} mean {mean:.1e}, {min(values):.1e} to {max(values):.1e}, {len(values)} layers")


if __name__ == "__main__":
    main()
