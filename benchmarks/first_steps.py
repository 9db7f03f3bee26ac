"""How far the first steps of Adam turn, for each size of PSOFT and OFT: does it grow with the size, and by which law?

    python benchmarks/first_steps.py -o benchmarks/results/first-steps.json

trains MiniLM on the word-order task for a few steps of one rate, from the same seed and on the same batches for every
size, and writes the spectral norm of Q over the rate: half the largest angle in radians, while it is small. Of the
layers the median is taken, and of the blocks of a layer the largest. Nothing else is measured, so it takes minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch

from isotune.algebra.skew import skew_from_vector
from isotune.experiments import methods, tasks
from isotune.experiments.files import write_json
from isotune.experiments.loading import load
from isotune.experiments.recipe import Method
from isotune.experiments.tasks.task import Task

SIZES = [("psoft", "r", size) for size in (16, 46, 128, 256)]
SIZES += [("oft", "oft_block_size", size) for size in (8, 16, 32, 64)]
RATE, STEPS, BATCH = 1e-3, (1, 5), 8


def norms(recipe_task: Task, method: Method, size: int) -> dict[int, float]:
    """Steps -> the median over layers of ‖Q‖₂ / rate after so many steps."""
    torch.manual_seed(0)
    model, head = recipe_task.build()
    model = methods.attach(method, model, head, recipe_task.peft_type).train()
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=RATE)
    encoded, found = recipe_task.encoded, {}
    for step in range(1, max(STEPS) + 1):
        batch = encoded.collate(encoded.train[BATCH * (step - 1) : BATCH * step])
        recipe_task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            entries = [own.detach() for name, own in trained.items() if ".generator" in name]
            largest = [float(torch.linalg.matrix_norm(skew_from_vector(own, size), 2).max()) for own in entries]
            found[step] = statistics.median(largest) / RATE
    return found


def measure() -> list[dict[str, object]]:
    """A row for each size."""
    recipe = load("demo", [f"train.batch_size={BATCH}"])
    task = tasks.make(recipe)
    rows: list[dict[str, object]] = []
    for name, key, size in SIZES:
        found = norms(task, Method(name=name, **{key: size}), size)
        rows.append({"method": name, key: size, "norm_over_rate": found, "factor": 2 * math.sqrt(size - 1)})
        shown = ", ".join(f"{value:.1f} after {step}" for step, value in found.items())
        print(f"{name} {key}={size}: {shown}; 2 sqrt(n - 1) = {2 * math.sqrt(size - 1):.1f}", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    write_json(given.output, {"rate": RATE, "batch": BATCH, "torch": torch.__version__, "rows": measure()})
