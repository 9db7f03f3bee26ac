"""Where the runs of a comparison are carried out: processes on this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import Any

from isotune.experiments.execute import attempt, execute, failure
from isotune.experiments.files import read_object, write_json
from isotune.experiments.run import Run
from isotune.experiments.tasks.task import Task
from isotune.methods.config import require_choice

Finished = tuple[Run, dict[str, Any]]


class Engine(ABC):
    """Carries out runs, at most `jobs` at a time."""

    jobs = 1

    @property
    def free(self) -> int:
        """How many runs can be started now."""
        return self.jobs - self.running

    @property
    @abstractmethod
    def running(self) -> int:
        """How many runs have been started and not been handed back."""

    @abstractmethod
    def start(self, run: Run) -> None:
        """Begin a run."""

    @abstractmethod
    def wait(self) -> list[Finished]:
        """Wait for a run to end, and hand back those that have with their records; a failure is a record too."""

    @abstractmethod
    def stop(self) -> None:
        """Stop all runs, leaving behind what they can be continued from."""

    @abstractmethod
    def close(self) -> None:
        """Give up what the engine holds."""


@dataclass
class _Child:
    run: Run
    process: Any


class ThisProcess(Engine):
    """One run at a time in this process, or in all those of a launcher together; what a run raises is raised.

    Args:
        task: of all the runs, whose data are then encoded once.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.waiting: list[Run] = []

    @property
    def running(self) -> int:
        return len(self.waiting)

    def start(self, run: Run) -> None:
        self.waiting.append(run)

    def wait(self) -> list[Finished]:
        run = self.waiting.pop()
        return [(run, execute(run, self.task))]

    def stop(self) -> None:
        """Nothing runs between two calls of `wait`."""

    def close(self) -> None:
        """Nothing is held."""


class LocalProcesses(Engine):
    """A fresh process for every run, at most `jobs` at a time; one that dies takes no other with it.

    A process begins as a copy of one that has imported everything, except where a GPU is used, which no copy can use.
    What a run prints goes to `log.txt` in its folder.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.children: list[_Child] = []
        method = "spawn"
        if "forkserver" in multiprocessing.get_all_start_methods() and not _has_gpu():
            method = "forkserver"
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(["isotune.experiments.preload"])

    @property
    def running(self) -> int:
        return len(self.children)

    def start(self, run: Run) -> None:
        process = self.context.Process(target=_child, args=(run,), name=run.title)
        process.start()
        self.children.append(_Child(run, process))

    def wait(self) -> list[Finished]:
        wait_for([child.process.sentinel for child in self.children])
        ended = [child for child in self.children if not child.process.is_alive()]
        self.children = [child for child in self.children if child not in ended]
        return [(child.run, _outcome(child)) for child in ended]

    def stop(self) -> None:
        """Ask every run for a checkpoint and wait for its end; a second Ctrl-C ends them at once."""
        try:
            for child in self.children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.process.pid, signal.SIGINT)
            for child in self.children:
                child.process.join()
        finally:
            self.close()

    def close(self) -> None:
        for child in self.children:
            child.process.kill()
            child.process.join()
        self.children = []


def make(name: str, jobs: int, threads: int, address: str | None = None) -> Engine:
    """The engine of a name.

    Args:
        name: "local" or "ray".
        jobs: how many runs at a time.
        threads: of a run.
        address: of a running Ray cluster.

    Raises:
        ValueError: another name, an address without Ray, or Ray cannot be had.
    """
    require_choice("--engine", name, ("local", "ray"))
    if name == "ray":
        return RayTasks(jobs, threads, address)
    if address is not None:
        raise ValueError(f"--address {address} is of a Ray cluster: give --engine ray, too")
    return LocalProcesses(jobs)


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _outcome(child: _Child) -> dict[str, Any]:
    code = child.process.exitcode
    if child.run.record.exists():
        return read_object(child.run.record)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return failure(child.run, f"the process {how}; what it said is in {child.run.folder}/log.txt")


def _child(run: Run) -> None:
    """The whole life of a process: one run, its record written, and no traceback on the terminal."""
    # Ctrl-C in a terminal reaches a whole group; here the parent alone hears it and passes it on, once.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(run.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        record = attempt(run)
        if "failed" in record:
            write_json(run.record, record)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _end_with_parent() -> None:
    """A run that nobody waits for must not go on beside its own continuation."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


class RayTasks(Engine):
    """A Ray task for every run, each in a process of its own with `threads` processors.

    Args:
        jobs: how many tasks to hand over at a time.
        threads: processors of a task.
        address: of a running cluster, as in `ray.init`; None starts Ray on this machine. The comparison's folder must
            be the same on every node, as checkpoints are kept there.

    Raises:
        ValueError: Ray is not installed, or does not answer.
    """

    def __init__(self, jobs: int, threads: int, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--engine ray needs Ray: pip install 'isotune[ray]'") from error
        self.ray: Any = ray
        self.jobs = jobs
        self.pending: dict[Any, Run] = {}
        self.owned = not ray.is_initialized()
        if self.owned:
            local = {"num_cpus": jobs * threads, "include_dashboard": False} if address is None else {}
            try:
                ray.init(address=address, logging_level="error", log_to_driver=False, **local)
            except (ConnectionError, ValueError, RuntimeError) as error:
                where = f"at {address}" if address else "on this machine"
                raise ValueError(f"cannot start or reach Ray {where}: {str(error).splitlines()[0]}") from error
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / jobs)
        # A process that lived on would count the memory of the runs before.
        self.remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0, max_calls=1)(attempt)

    @property
    def running(self) -> int:
        return len(self.pending)

    def start(self, run: Run) -> None:
        self.pending[self.remote.remote(run)] = run

    def wait(self) -> list[Finished]:
        ready, _ = self.ray.wait(list(self.pending), num_returns=1)
        ended = [(reference, self.pending.pop(reference)) for reference in ready]
        return [(run, self._outcome(reference, run)) for reference, run in ended]

    def _outcome(self, reference: Any, run: Run) -> dict[str, Any]:
        try:
            record: dict[str, Any] = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return failure(run, f"Ray: {lines[0] if lines else type(error).__name__}")
        return record

    def stop(self) -> None:
        """Interrupt every task as Ctrl-C does, and wait until their checkpoints are written."""
        for reference in self.pending:
            self.ray.cancel(reference)
        if self.pending:
            self.ray.wait(list(self.pending), num_returns=len(self.pending))
        self.pending = {}

    def close(self) -> None:
        if self.owned:
            self.ray.shutdown()
