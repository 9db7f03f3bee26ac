"""What goes on beside the steps of a run: its bar, its checkpoints, Ctrl-C, and the end of a loss that is no number."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from isotune.experiments import processes
from isotune.experiments.files import read_object, storing, write_json, write_text
from isotune.experiments.recipe import Metric
from isotune.experiments.text import from_json


class TrainingDiverged(ValueError):
    """The loss is no longer a number; the message names the step and the last good checkpoint."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, raised once a checkpoint has been written."""


def diverged(what: str, step: int, folder: str) -> TrainingDiverged:
    """The error for a loss that is not a number at `step`."""
    last = last_checkpoint(Path(folder))
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return TrainingDiverged(f"{what} at step {step}: lower train.lr, or raise train.warmup_ratio; {kept}")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one cut off while it was written, or damaged since, is removed."""
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if newest is None:
        return None
    if _is_whole(Path(newest)):
        return Path(newest)
    shutil.rmtree(newest)
    return last_checkpoint(folder)


def _is_whole(checkpoint: Path) -> bool:
    """Whether all is there that Trainer goes on from: it takes up whatever it finds, and begins the rest anew."""
    parts = list(checkpoint.glob("*.pt*"))
    names = " ".join(path.name for path in parts)
    if not all(name in names for name in ("optimizer", "scheduler", "rng_state")):
        return False
    try:
        from_json((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for path in parts:
            zipfile.ZipFile(path).close()  # which reads the list of contents at the file's end
    except (FileNotFoundError, ValueError, zipfile.BadZipFile):  # any other error says nothing of the checkpoint
        return False
    return _has_weights(checkpoint)


def _has_weights(checkpoint: Path) -> bool:
    weights = list(checkpoint.glob("*.safetensors"))
    try:
        for path in weights:
            with safe_open(path, "pt"):  # compares the length of the file with what it should hold
                pass
    except (FileNotFoundError, SafetensorError):
        return False
    return bool(weights)


def prepare_to_resume(folder: Path) -> None:
    """Leave in a run's folder what can be resumed, wherever the folder was when its checkpoints were written.

    Trainer stores where the best checkpoint lay. Of a folder that was moved since it would end with the last
    checkpoint in the place of the best, and say nothing.

    Raises:
        ValueError: the best checkpoint is no longer there, or damaged.
    """
    newest = last_checkpoint(folder)  # removes what was cut off
    if newest is None:
        return
    file = newest / TRAINER_STATE_NAME
    state = read_object(file)
    if state.get("best_model_checkpoint") is None:
        return
    best = folder / f"checkpoint-{state['best_global_step']}"
    if not _has_weights(best):
        state_of_it = "damaged" if best.is_dir() else "gone"
        raise ValueError(
            f"{best}, the best checkpoint so far, is {state_of_it}; put it back, or remove {folder} to train anew"
        )
    if state["best_model_checkpoint"] != str(best):
        with storing(str(file)):  # a loss in its history may be no number, unlike in our own records
            write_text(file, json.dumps({**state, "best_model_checkpoint": str(best)}, indent=2) + "\n")


class Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar, the seconds spent over all sessions of a run, and a checkpoint at Ctrl-C.

    `seconds` are those of training, `stepping` those of its steps alone, and `evaluating` those of what is measured on
    the way, which is no part of either.
    """

    def __init__(self, title: str, folder: Path, metric: Metric) -> None:
        self.title, self.folder, self.metric = title, folder, metric
        self.spent = folder / "seconds.json"
        self.interrupted = False
        self.before, self.started = 0.0, time.perf_counter()
        self.stepping, self.step_started, self.evaluating = 0.0, 0.0, 0.0
        self.bar: Any = None

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """While it is entered the seconds are those of an evaluation."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.started += took
            self.evaluating += took

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step and self.spent.exists():
            stored = read_object(self.spent).get(str(state.global_step), ())
            self.before, self.stepping, self.evaluating = (*stored, 0.0, 0.0, 0.0)[:3]  # two in earlier releases
        self.bar = processes.bar(state.max_steps, state.global_step, self.title, "step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stepping += time.perf_counter() - self.step_started
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True  # the last step is scored wherever it falls
        self._log_with_checkpoint(control)
        # At the end of an epoch the checkpoint is left to the epoch's own end, which scores before it saves.
        if self.interrupted and not (args.eval_strategy == "epoch" and float(state.epoch).is_integer()):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._log_with_checkpoint(control)

    def _log_with_checkpoint(self, control: Any) -> None:
        """Trainer does not store the sum of losses since the last point, so a planned checkpoint begins a new one."""
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix({"loss": f"{logs['loss']:.3f}"}, refresh=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.bar.set_postfix({f"validation {self.metric}": f"{metrics[f'eval_{self.metric}']:.3f}"})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if processes.is_main():
            # Trainer pickles its own arguments beside each checkpoint; nothing here reads a pickle.
            (self.folder / f"checkpoint-{state.global_step}" / "training_args.bin").unlink(missing_ok=True)
            known = read_object(self.spent) if self.spent.exists() else {}
            write_json(self.spent, {**known, str(state.global_step): (self.seconds, self.stepping, self.evaluating)})
        # Left from here, not by `should_training_stop`: that would score and save once more in mid-epoch.
        if self.interrupted and state.global_step < state.max_steps:
            raise Interrupted(str(self.folder))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @contextlib.contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C asks for a checkpoint after the running step; a second one stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            tqdm.write("interrupted: saving a checkpoint (Ctrl-C again to stop at once)", file=sys.stderr)

        # Handlers are set by the main thread alone, and a job put into the background ignores Ctrl-C for a reason.
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or previous is signal.SIG_IGN:
            yield
            return
        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
