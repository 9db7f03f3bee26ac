"""Carrying an experiment out: the runs that are left, the file about all of them, and what follows a training."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isotune.experiments import processes, table
from isotune.experiments.engines import Engine
from isotune.experiments.execute import RELOADED
from isotune.experiments.files import read_object, write_json
from isotune.experiments.records import RESULT, Record
from isotune.experiments.run import Run
from isotune.experiments.schedule import Key, Schedule


def carry_out(schedule: Schedule, engine: Engine) -> dict[str, Any]:
    """Carry out what is left of an experiment, and write and return what its file RESULT then holds.

    Of a training what is returned says besides where its `adapter` lies.

    Under torchrun or `accelerate launch` all processes train together, and the main one alone writes and logs.

    Raises:
        RecipeError: the folder holds something else, or another process is writing to it.
        KeyboardInterrupt: Ctrl-C, once the runs that were going on have saved a checkpoint.
        StorageError: there is no room.
        ValueError: a run in this process failed, as `execute` says.
    """
    with schedule.alone():
        return _carry_out(schedule, engine)


def _carry_out(schedule: Schedule, engine: Engine) -> dict[str, Any]:
    schedule.begin()
    path, total, done = schedule.folder / RESULT, schedule.total(), len(schedule.records)
    for note in schedule.notes:
        processes.say(note)
    processes.say(
        "{train} training, {validation} validation and {test} test examples; ".format(**schedule.about)
        + f"{total} run{'s' * (total != 1)}, {done} of them done; results in {schedule.folder}"
    )
    if schedule.training and done == total:
        processes.say(f"already finished; remove {schedule.folder} to run it again")
    bar = processes.bar(total, min(total, done), "comparing", "run", hidden=schedule.training)
    try:
        for run, record in _runs(schedule, engine, bar):
            bar.total = max(bar.total, schedule.total())  # a search may go on
            bar.update(len(schedule.records) - bar.n)
            processes.say(_line(run, record))
            if processes.is_main():
                write_json(path, schedule.result())
    except KeyboardInterrupt:
        if not schedule.training:
            processes.say("interrupted: the runs save a checkpoint (Ctrl-C again to stop at once)")
        engine.stop()
        raise
    finally:
        engine.close()
        bar.close()
    result = schedule.result()
    if processes.is_main():
        if schedule.training:
            _finish(schedule, result, redraw=done < total)
        elif not schedule.keep_adapters and all(record.failed is None for record in schedule.records.values()):
            shutil.rmtree(schedule.folder / "work", ignore_errors=True)
        write_json(path, result)
    if schedule.training:  # not in the file, which may be moved with its folder
        result["adapter"] = str(schedule.folder / _own_folder(schedule).name / "adapter")
    return result


def _runs(schedule: Schedule, engine: Engine, bar: Any) -> Iterator[tuple[Run, Record]]:
    """Start each run as soon as it can be, and hand it out with its record once it has ended.

    Until then the bar says what is being done, and for how long.
    """
    running: set[Key] = set()
    while True:
        for run in schedule.ready():
            if engine.free and run.key not in running:
                running.add(run.key)
                if run.key in schedule.records:
                    processes.say(f"{run.title}, again for its weights, from which others start")
                else:
                    place = len(running | schedule.records.keys())
                    processes.say(f"run {place} of {schedule.total()}: {run.title}, starting")
                engine.start(run)
        if not engine.running:
            return
        while not (ended := engine.wait()):
            doing = engine.doing()
            bar.set_description_str(f"comparing ({doing})" if doing else "comparing")
        for run, content in ended:
            running.discard(run.key)
            schedule.add_record(run, content)
            yield run, schedule.records[run.key]


def _line(run: Run, record: Record) -> str:
    if record.failed is not None:
        return f"{run.title}: failed, {record.failed}"
    chosen = record.validation.get(record.metric)
    found = [] if chosen is None else [f"validation {chosen:.4f}"]
    found += [] if record.score is None else [f"test {record.score:.4f}"]
    found += [] if record.stopped is None else [f"stopped at step {record.stopped.step} of {record.stopped.of}"]
    return f"{run.title}: {', '.join(found)}, {record.train_seconds or 0:.0f} s"


def _finish(schedule: Schedule, result: dict[str, Any], *, redraw: bool) -> None:
    """Score what the recipe's own method has saved, and draw the chart, where the recipe asks for them."""
    if schedule.recipe.check_saved:
        folder = _own_folder(schedule)
        if not (folder / RELOADED).exists():
            _check_saved(folder)
        result["saved"] = read_object(folder / RELOADED)
    chart = schedule.folder / "chart.png"
    if schedule.recipe.chart and (redraw or not chart.exists()):
        table.chart(result, chart)


def _own_folder(schedule: Schedule) -> Path:
    """Where the recipe's own method has been trained, at its best rate."""
    variant = schedule.variants[-1]
    best = schedule.best(variant)
    return next(run.folder for run in schedule.search(variant) if run.lr == best)


def _check_saved(folder: Path) -> None:
    """Score the saved adapter, reloaded and merged, in a new process; raises RuntimeError at failure."""
    processes.say("reloading the saved adapter in a new process")
    command = [sys.executable, "-m", "isotune.experiments.reload", str(folder.parent), folder.name]
    done = subprocess.run(command, capture_output=True, text=True, env=processes.environment_alone())
    if done.returncode:
        raise RuntimeError(f"reloading {folder} in a new process failed:\n{done.stderr}")
