"""Scripts run as from the command line, in copies of a process that has imported what takes their time."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
LIMIT = 300
"""Seconds after which a script hangs."""


def run_script(name: str, *arguments: str, folder: Path) -> CompletedProcess[str]:
    """Run a script to its end, with one thread and nothing left of it in this process.

    Args:
        name: its path in the repository.
        arguments: of its command line.
        folder: where what it prints is kept.
    """
    # With the same preload as the engine of the library, whose server of copies this is in one process.
    copies = multiprocessing.get_context("forkserver")
    copies.set_forkserver_preload(["isotune.experiments.preload"])
    streams = folder / "stdout.txt", folder / "stderr.txt"
    child = copies.Process(target=_run, args=(str(ROOT / name), arguments, *map(str, streams)))
    child.start()
    child.join(LIMIT)
    if child.exitcode is None:
        child.kill()
        child.join()
    assert child.exitcode is not None
    stdout, stderr = (path.read_text() for path in streams)
    return CompletedProcess([name, *arguments], child.exitcode, stdout, stderr)


def _run(path: str, arguments: tuple[str, ...], *streams: str) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
