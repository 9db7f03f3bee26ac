"""Scripts run as from the command line, in copies of a process that has imported what takes their time."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 300
"""Seconds after which a script hangs."""
STREAMS = ("stdout.txt", "stderr.txt")


def run_script(name: str, *arguments: str, folder: Path) -> CompletedProcess[str]:
    """Run a script to its end, with one thread and nothing left of it in this process.

    Args:
        name: its path in the repository.
        arguments: of its command line.
        folder: where what it prints is kept.
    """
    (code,) = _ended([_started(ROOT / name, arguments, folder, {})])
    stdout, stderr = (folder.joinpath(stream).read_text() for stream in STREAMS)
    return CompletedProcess([name, *arguments], code, stdout, stderr)


def printed_by(code: str, *arguments: str, folder: Path) -> str:
    """What this code prints, run as a script that must succeed and is kept in the folder."""
    script = folder / "script.py"
    script.write_text(code)
    done = run_script(str(script), *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(count: int, script: str, folder: Path, *arguments: str) -> list[Any]:
    """What each of several processes finds, that meet as those of torchrun do.

    Args:
        count: of the processes.
        script: a path; it writes rank-N.json, N the process, into the folder that is the first of its arguments.
        folder: that one.
        arguments: after it.
    """
    from torch.distributed import TCPStore

    # The first process could offer it, but on a port that is free no longer by then.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    group |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    printed = [folder / f"printed-{rank}" for rank in range(count)]
    processes = []
    for rank, own in enumerate(printed):
        own.mkdir(parents=True)
        environment = {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
        processes.append(_started(Path(script), [str(folder), *arguments], own, environment))
    codes = _ended(processes)
    assert not any(codes), "\n".join([str(codes), *((own / STREAMS[1]).read_text()[-4000:] for own in printed)])
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


def copies() -> Any:
    """Processes that begin as copies of one, from which the engine of the library takes its own too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["isotune.experiments.preload"])
    return context


def _started(path: Path, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Any:
    # The server's own environment is that of when it began.
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    child = copies().Process(target=_run, args=(str(path), list(arguments), str(folder), everything))
    child.start()
    return child


def _ended(processes: Sequence[Any]) -> list[int]:
    """How they ended, all of them killed with the first that fails or when the time is over."""
    while running := [process for process in processes if process.exitcode is None]:
        if not wait([process.sentinel for process in running], LIMIT) or any(process.exitcode for process in processes):
            for process in running:
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def _run(path: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    for number, stream in enumerate(STREAMS, start=1):
        os.dup2(os.open(Path(folder, stream), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
