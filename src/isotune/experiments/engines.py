"""Where the runs of a comparison are carried out: processes on this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from multiprocessing.connection import wait as wait_for
from typing import Any

from isotune.experiments.execute import attempt, execute, failure
from isotune.experiments.files import read_object, write_json
from isotune.experiments.run import Run
from isotune.experiments.tasks.task import Task
from isotune.experiments.text import first_line
from isotune.internals.progress_bars import last_title, show_progress
from isotune.methods.checks import require_choice
from isotune.versions import install

Finished = tuple[Run, dict[str, Any]]


class Engine(ABC):
    """Carries out runs, at most `jobs` at a time."""

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self.pending: dict[Any, Run] = {}
        """What has been started and not been handed back, by what carries it out."""

    @property
    def free(self) -> int:
        """How many runs can be started now."""
        return self.jobs - self.running

    @property
    def running(self) -> int:
        """How many runs have been started and not been handed back."""
        return len(self.pending)

    @abstractmethod
    def start(self, run: Run) -> None:
        """Begin a run."""

    @abstractmethod
    def wait(self) -> list[Finished]:
        """Wait for a run to end, and hand back those that have with their records; a failure is a record too.

        May end without one, so that meanwhile it can be shown what is being done.
        """

    def doing(self) -> str:
        """What the run that was started first does now, in words; empty where that is not known."""
        return ""

    def stop(self) -> None:
        """Stop all runs, leaving behind what they can be continued from."""
        self.close()

    def close(self) -> None:
        """Give up what the engine holds."""
        self.pending = {}


class ThisProcess(Engine):
    """One run of a task at a time in this process, or in all those of a launcher together; what it raises is raised."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def start(self, run: Run) -> None:
        self.pending[run.key] = run

    def wait(self) -> list[Finished]:
        _, run = self.pending.popitem()
        _ = self.task.encoded  # so that no run is timed with it
        return [(run, execute(run, self.task))]


class LocalProcesses(Engine):
    """A fresh process for every run, at most `jobs` at a time; one that dies takes no other with it.

    A process begins as a copy of one that has imported everything, except where a GPU is used, which no copy can use.
    What a run prints goes to `log.txt` in its folder.
    """

    def __init__(self, jobs: int) -> None:
        import torch

        super().__init__(jobs)
        copies = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
        self.context: Any = multiprocessing.get_context("forkserver" if copies else "spawn")
        if copies:
            self.context.set_forkserver_preload(["isotune.experiments.preload"])

    def start(self, run: Run) -> None:
        process = self.context.Process(target=_child, args=(run,), name=run.title)
        process.start()
        self.pending[process] = run

    def wait(self) -> list[Finished]:
        wait_for([process.sentinel for process in self.pending], timeout=1.0)
        ended = [(process, run) for process, run in self.pending.items() if not process.is_alive()]
        for process, _ in ended:
            del self.pending[process]
        return [(run, _outcome(run, process.exitcode)) for process, run in ended]

    def doing(self) -> str:
        run = next(iter(self.pending.values()), None)
        return "" if run is None else last_title(run.folder / "log.txt")

    def stop(self) -> None:
        """Ask every run for a checkpoint and wait for its end; a second Ctrl-C ends them at once."""
        try:
            for process in self.pending:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
            for process in self.pending:
                process.join()
        finally:
            self.close()

    def close(self) -> None:
        for process in self.pending:
            process.kill()
            process.join()
        super().close()


def make(name: str, jobs: int, threads: int, address: str | None = None) -> Engine:
    """The engine "local" or "ray".

    Args:
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


def _outcome(run: Run, code: int) -> dict[str, Any]:
    if run.record.exists():
        return read_object(run.record)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return failure(run, f"the process {how}; what it said is in {run.folder}/log.txt")


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
    show_progress("lines")
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
    """A Ray task for every run, at most `jobs` at a time, each in a process of its own with `threads` processors.

    Args:
        address: of a running cluster, as in `ray.init`; None starts Ray on this machine. The comparison's folder must
            be the same on every node, as checkpoints are kept there.
    """

    def __init__(self, jobs: int, threads: int, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(f"--engine ray needs Ray: {install('ray')}") from error
        super().__init__(jobs)
        self.ray: Any = ray
        self.owned = not ray.is_initialized()
        if self.owned:
            local = {"num_cpus": jobs * threads, "include_dashboard": False} if address is None else {}
            try:
                ray.init(address=address, logging_level="error", log_to_driver=False, **local)
            except (ConnectionError, ValueError, RuntimeError) as error:
                where = f"at {address}" if address else "on this machine"
                raise ValueError(f"cannot start or reach Ray {where}: {first_line(error)}") from error
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / jobs)
        # A process that lived on would count the memory of the runs before.
        self.remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0, max_calls=1)(attempt)

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
            return failure(run, f"Ray: {first_line(error)}")
        return record

    def stop(self) -> None:
        """Interrupt every task as Ctrl-C does, and wait until their checkpoints are written."""
        for reference in self.pending:
            self.ray.cancel(reference)
        if self.pending:
            self.ray.wait(list(self.pending), num_returns=len(self.pending))
        super().close()

    def close(self) -> None:
        super().close()
        if self.owned:
            self.ray.shutdown()
