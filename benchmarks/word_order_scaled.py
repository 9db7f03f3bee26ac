"""Which learning rate each size of PSOFT and OFT wants, with and without scaled generators, on the word-order task.

    python benchmarks/word_order_scaled.py -o benchmarks/results/word-order-scaled --jobs 2

trains every size at every rate, in two comparisons: `plain` and `scaled`. The same command goes on where it was
stopped. To be affordable on one core, each run is short: 250 steps of 8 sentences of at most 12 words of the task
`data.builtin: stdlib-word-order`, the first three of MiniLM's six layers, one seed. `--table` prints what the records
say, as the tables of docs/evidence/one-rate.md.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from pathlib import Path

from isotune.experiments import compare, engines, stdlib_word_order
from isotune.experiments.files import read_object, write_json
from isotune.experiments.loading import load
from isotune.experiments.models import locate
from isotune.experiments.records import RESULT

DATA, MODEL = Path("runs/word-order-short"), Path("runs/minilm-3")
WORDS, LAYERS = 12, 3
PROTOCOL = ["train.max_steps=250", "train.batch_size=8", "check_saved=false"]
PLAIN, SCALED = (2.5e-4, 6.3e-4, 1.6e-3, 4e-3), (2e-3, 5e-3, 1.25e-2, 3.1e-2)
OFT_PLAIN, OFT_SCALED = (4e-4, 1e-3, 2.5e-3, 6.3e-3), (5e-3, 1.25e-2, 3.1e-2, 7.8e-2)
SWEEP = [
    *[("plain", "psoft:r=46", PLAIN), ("scaled", "psoft:r=46", SCALED)],
    *[("plain", "psoft:r=128", PLAIN), ("scaled", "psoft:r=128", SCALED)],
    *[("scaled", "oft:oft_block_size=8", OFT_SCALED), ("scaled", "oft:oft_block_size=64", OFT_SCALED)],
    *[("plain", "psoft:r=16", PLAIN), ("scaled", "psoft:r=16", SCALED)],
    *[("scaled", "oft:oft_block_size=32", OFT_SCALED), ("scaled", "oft:oft_block_size=16", OFT_SCALED)],
    *[("plain", "psoft:r=256", PLAIN), ("scaled", "psoft:r=256", SCALED)],
    *[("plain", f"oft:oft_block_size={size}", OFT_PLAIN) for size in (8, 64, 32, 16)],
]
"""The most telling first. With Adam a scaled OFT at a rate is OFT at that rate over 2 √(b − 1)
(tests/methods/test_scaled_generator.py), so its plain form comes last."""
FIRST, COUNT = (1, 2), 8
"""Of the first COUNT of these, the rates in the middle are trained before all others."""


def short_sentences() -> list[str]:
    """Write the task's short sentences as files, and return the overrides that make a recipe read them."""
    DATA.mkdir(parents=True, exist_ok=True)
    for split, rows in stdlib_word_order.build().items():
        with open(DATA / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows(row for row in rows if len(row[0].split()) <= WORDS)
    files = ", ".join(f"{split}: {split}.csv" for split in ("train", "validation", "test"))
    return ["data.builtin=null", f"data.path={DATA}", f"data.files={{{files}}}"]


def short_model(name: str) -> list[str]:
    """Write a copy of an encoder with its first layers alone, and return the override that makes a recipe use it."""
    shutil.copytree(locate(name), MODEL, dirs_exist_ok=True)
    config = read_object(MODEL / "config.json")
    write_json(MODEL / "config.json", {**config, "num_hidden_layers": LAYERS})
    return [f"model={MODEL}"]


def sweep(folder: Path, jobs: int, minutes: float) -> None:
    """Train what is left, and begin nothing more after so many minutes."""
    model, began = load("demo", []).model, time.monotonic()
    recipe = load("demo", [*short_sentences(), *short_model(model), *PROTOCOL])
    schedules = {}
    for form in ("plain", "scaled"):
        option = "+scaled_generator=true" if form == "scaled" else ""
        methods = [
            f"{method}{option}+lr=[{','.join(f'{rate:g}' for rate in rates)}]"
            for other, method, rates in SWEEP
            if other == form
        ]
        options = compare.Options(methods=methods, seeds=1, threads=1)
        schedules[form] = compare.plan("demo", recipe, options, folder / form)
        schedules[form].begin()
    left = dict.fromkeys(schedules, 0)
    waiting = []
    for place, (form, _, _rates) in enumerate(SWEEP):
        variant = schedules[form].variants[left[form]]
        left[form] += 1
        for index, run in enumerate(schedules[form].search(variant)):
            late = index not in FIRST if place < COUNT else True
            if run.key not in schedules[form].records:
                waiting.append((place >= COUNT, late, place, index, form, run))
    waiting.sort(key=lambda item: item[:4])
    engine, forms = engines.make("local", jobs, 1), {}
    try:
        while waiting or engine.running:
            while waiting and engine.free and time.monotonic() - began < 60 * minutes:
                *_, form, run = waiting.pop(0)
                forms[run.record] = form
                engine.start(run)
            if not engine.running:
                break
            for run, content in engine.wait():
                form = forms[run.record]
                schedules[form].add_record(run, content)
                write_json(folder / form / RESULT, schedules[form].result())
                print(f"{form} {run.title}: {content.get('test', content)}", flush=True)
    finally:
        engine.close()


def table(folder: Path) -> str:
    """The test accuracy of every run, in percent: a row for each size, a column for each rate."""
    lines = []
    for form in ("plain", "scaled"):
        records = [read_object(path) for path in (folder / form / "runs").rglob("*.json")]
        for name, key, letter in (("psoft", "r", "r"), ("oft", "oft_block_size", "b")):
            own = [record for record in records if record["method"]["name"] == name]
            rates = sorted({record["lr"] for record in own})
            if not own:
                continue
            lines += ["", f"| {name.upper()}, {form} | {' | '.join(f'{rate:g}' for rate in rates)} |"]
            lines.append("|---|" + "---|" * len(rates))
            for size in sorted({record["method"][key] for record in own}):
                found = {r["lr"]: r["test"]["accuracy"] for r in own if r["method"][key] == size}
                cells = (f"{100 * found[rate]:.1f}" if rate in found else "" for rate in rates)
                lines.append(f"| {letter} = {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time, each with one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more runs after so many minutes")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, and train nothing")
    given = parser.parse_args()
    if given.table:
        print(table(given.output))
    else:
        sweep(given.output, given.jobs, given.minutes)
