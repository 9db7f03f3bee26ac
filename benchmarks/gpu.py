"""isotune on a GPU: is it right, how fast, how much memory; the most important figures first.

    python benchmarks/gpu.py --minutes 8 -o results.json    # with an NVIDIA GPU, no network; again to continue
    python benchmarks/gpu.py --only step start/8b           # the pieces whose names begin so
    python benchmarks/gpu.py --dry-run                      # tiny sizes on a CPU: the command itself is tried
    python benchmarks/gpu.py --pack-minilm FOLDER           # all-MiniLM-L6-v2 in float16, for --minilm FOLDER there
    python benchmarks/gpu.py --show -o results.json         # the table of what is there
    python benchmarks/gpu.py --write docs/evidence/speed.md -o benchmarks/results/gpu/h100.json

Random weights at the shapes of Llama-3.1-8B, Llama-3.2-3B and Llama-3.2-1B, bf16, all seven projections; times are
medians of interleaved rounds in one process, and ratios are to PEFT LoRA r=16 of the same round (decoding: to the
frozen model). Every figure is written as soon as it is there; a piece that is in the file already, of the same card,
versions and sources of isotune, is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
# Before anything imports transformers or isotune: no network, and no subspaces of an earlier run.
os.environ |= {"HF_HUB_OFFLINE": "1", "ISOTUNE_CACHE": "off", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

try:
    import torch
except ImportError:
    sys.exit(f"error: {sys.executable} has no PyTorch; say which Python has it: make gpu PYTHON=…")

from gpu_bench import decode, learning, markdown, profile, right, start, training  # noqa: E402
from gpu_bench.journal import Clock, Journal, Note, environment  # noqa: E402
from gpu_bench.models import Settings, chosen, configs, goals, heavy, usual  # noqa: E402
from gpu_bench.table import table  # noqa: E402
from gpu_bench.timing import free  # noqa: E402

LEAST_LEARNING = 60
"""Seconds under which no training is begun."""


@dataclass(frozen=True)
class Piece:
    """One measurement, by its name, with the seconds that it is expected to take the first time."""

    name: str
    seconds: float
    measure: Callable[[Note], object]
    apart: bool = False
    """Whether it has a process of its own: where a capture has failed, random numbers may fail ever after."""


def pieces(settings: Settings, options: argparse.Namespace, clock: Clock) -> Iterator[Piece]:
    """All of them, the most important first; nothing is timed after the profile, whose library slows launches."""
    few = max(1, settings.layers // 2)
    everything, some = configs(settings), usual(settings)
    small, _, _, largest = settings.ranks

    def step(name: str, seconds: float, shape: str, **more: object) -> Piece:
        variants = more.pop("variants", everything)
        more = {"layers": settings.layers, "seconds": seconds / 3, **more}
        run = functools.partial(training.race, settings, shape=shape, variants=variants, **more)  # type: ignore[arg-type]
        return Piece(f"step/{shape}/{name}", seconds, lambda note: run(note=note))

    yield step("1x", 110, "8b")
    slow = {"variants": heavy(settings), "layers": settings.heavy_layers, "rounds": min(3, settings.rounds)}
    yield step("heavy", 30, "8b", **slow)
    for name in ("3b", "8b"):
        yield step("whole", 60, name, variants=goals(settings), layers=settings.shapes[name].layers)
    yield Piece("right", right.LIMIT, lambda note: right.run_tests(note, options.tests))
    for rank in (small, largest):
        yield Piece(f"start/8b/r={rank}", 90, lambda note, r=rank: start.whole_model(settings, note, "8b", r))
    shape = settings.shapes["8b"]
    keys = shape.width // shape.heads * shape.groups
    sizes = [(shape.width, shape.width), (keys, shape.width), (shape.inner, shape.width), (shape.width, shape.inner)]
    for size in sizes:
        solve = functools.partial(start.one_layer, settings, size=size, ranks=(small, largest), svd=size == sizes[1])
        yield Piece(f"start/layer/{size[0]}x{size[1]}", 15, lambda note, solve=solve: solve(note))
    for how, seconds, measure in (("eager", 35.0, decode.eager), ("graph", 40.0, decode.captured)):
        for batch in (1, 16):
            run = functools.partial(measure, settings, shape="8b", layers=few, batch=batch)
            yield Piece(f"decode/{how}/batch={batch}", seconds, lambda note, run=run: run(note), how == "graph")
    for name in ("3b", "1b"):
        yield step("1x", 90, name)
    for name in ("8b", "3b", "1b"):
        yield step("4x", 45, name, batch=4, variants={**some, **chosen(settings, f"isotune LoRA-XS r={small}")})
        yield step("checkpointing", 45, name, checkpointing=True, variants=some)
    # First what is sure to be captured: after one that fails, others may fail, too.
    own = {name: make for name, make in everything.items() if name.startswith("isotune")}
    ordered = {**some, **own, **everything}
    yield Piece("graph/8b", 90, lambda note: training.captured(settings, note, "8b", ordered, few), apart=True)
    for mode in ("default", "reduce-overhead"):
        traced = chosen(settings, *list(some)[:3]) if settings.dry else some
        compiled = functools.partial(training.compiled, settings, shape="8b", variants=traced, layers=few, mode=mode)
        yield Piece(f"compiled/8b/{mode}", 120, lambda note, compiled=compiled: compiled(note))
    yield Piece("decode/compiled/batch=1", 90, lambda note: decode.compiled(settings, note, "8b", few, 1))
    seen = some if settings.dry else everything
    yield Piece("profile/8b", 60, lambda note: profile.profiled(settings, note, "8b", seen, settings.layers))
    folder = options.learning or options.output.with_suffix("") / "docstrings"
    learn = functools.partial(learning.learn, settings, clock=clock, model=options.minilm, folder=folder)
    yield Piece("learning/docstrings", LEAST_LEARNING, lambda note: learn(note))


def selected(all_of_them: list[Piece], journal: Journal, options: argparse.Namespace) -> list[Piece]:
    """What is left to do: those asked for that are not held, those that failed before at the end."""

    def begins(name: str, prefixes: list[str]) -> bool:
        return any(f"{name}/".startswith(f"{prefix.rstrip('/')}/") for prefix in prefixes)

    for prefix in [*options.only, *options.again]:
        if not any(begins(piece.name, [prefix]) for piece in all_of_them):
            known = ", ".join(dict.fromkeys(piece.name.split("/")[0] for piece in all_of_them))
            raise SystemExit(f"there is no piece {prefix!r}; they begin with {known}")
    wanted = [p for p in all_of_them if not options.only or begins(p.name, [*options.only, *options.again])]
    left = [p for p in wanted if begins(p.name, options.again) or not journal.holds(p.name)]
    return sorted(left, key=lambda piece: journal.failed(piece.name) and not begins(piece.name, options.again))


def measured(piece: Piece, journal: Journal, clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """Carry out a piece, here or in a process of its own, and return what is noted of it."""
    apart = piece.apart and (options.processes or not options.dry_run) and not options.here
    if not apart:
        return journal.run(piece.name, piece.measure)
    given = ["--only", piece.name, "--again", piece.name, "--minutes", str(clock.left() / 60 + 1)]
    given += ["-o", str(options.output), "--layers", str(options.layers), "--here"]
    call = [sys.executable, __file__, *given, *(["--dry-run"] if options.dry_run else [])]
    before = journal.results["pieces"].get(piece.name)
    ended = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    journal.read()
    found: dict[str, Any] | None = journal.results["pieces"].get(piece.name)
    if found is not None and found != before:
        return found

    def failed(note: Note) -> None:
        raise RuntimeError(f"its process ended with code {ended.returncode}: {ended.stdout[-300:]}")

    return journal.run(piece.name, failed)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="after which no piece is begun that would not end")
    parser.add_argument("-o", "--output", type=Path, default=Path("results.json"))
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="pieces whose names begin so")
    parser.add_argument("--again", nargs="+", default=[], metavar="SECTION", help="measure these anew")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--show", action="store_true", help="print the table of the file, and measure nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the file's tables into a page, and end")
    parser.add_argument("--list", action="store_true", help="print the names of the pieces and their expected seconds")
    parser.add_argument("--layers", type=int, default=8, help="blocks of each model of a race")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "gpu", help="the folder of the section right")
    parser.add_argument("--minilm", type=Path, help="what --pack-minilm wrote; default: the package's own")
    parser.add_argument("--learning", type=Path, help="folder of the comparison; default: beside the results")
    parser.add_argument("--pack-minilm", type=Path, metavar="FOLDER", help="write the model for --minilm, and end")
    own = "captured pieces in processes of their own in a dry run, too, as they always are on a GPU"
    parser.add_argument("--processes", action="store_true", help=own)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure what is left, and print the table; returns the exit status."""
    options = arguments()
    if options.pack_minilm:
        print(f"{options.pack_minilm}: {learning.pack(options.pack_minilm) / 2**20:.1f} MiB")
        return 0
    if options.write:
        markdown.write(options.write, Journal(options.output, {}).results)
        return 0
    if not (options.dry_run or options.show or options.list or torch.cuda.is_available()):
        print("torch finds no GPU here; --dry-run tries the command on the CPU", file=sys.stderr)
        return 2
    clock = Clock(options.minutes)
    settings = Settings.of_dry_run() if options.dry_run else Settings.of_gpu(options.layers)
    everything = list(pieces(settings, options, clock))
    if options.list:
        print("\n".join(f"{piece.name}  {piece.seconds:g} s" for piece in everything))
        return 0
    journal = Journal(options.output, {} if options.show else environment(options.dry_run))
    if options.show:
        print(table(journal.results))
        return 0
    warnings.filterwarnings("ignore")
    try:
        for piece in selected(everything, journal, options):
            expected = 0 if options.dry_run else journal.seconds(piece.name) or piece.seconds
            if clock.left() < expected:
                print(f"{piece.name}: left out, {expected:.0f} s expected and {clock.left():.0f} s left", flush=True)
                continue
            found = measured(piece, journal, clock, options)
            failed = f", failed: {'; '.join(found['errors'])}" if found["errors"] else ""
            print(f"{piece.name}: {found['seconds']:g} s{failed}", flush=True)
            try:
                free()
                settings.wait()
            except RuntimeError as error:
                journal.reopen(piece.name)
                print(f"the device is lost to this process, and the same command continues: {error}", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    finally:
        print(f"\n{table(journal.results)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
