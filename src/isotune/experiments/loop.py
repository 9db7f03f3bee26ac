"""One training run through transformers' Trainer: two learning rates, a calm bar, safe to interrupt."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from isotune.experiments import processes
from isotune.experiments.files import StorageError, read_json, storing, write_json
from isotune.experiments.recipe import LESS_IS_BETTER, Metric, Train
from isotune.files.base_model import quiet
from isotune.tools.regularization import has_regularization, regularization_callback

Row = dict[str, Any]

_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in TrainingArguments.__annotations__
)
"""What transformers calls activation checkpointing; where it knows the first name, the second is deprecated."""


class TrainingDiverged(ValueError):
    """The loss is no longer a number; the message names the step and the last good checkpoint."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, raised once a checkpoint has been written."""


@dataclass(frozen=True)
class Encoded:
    """What a run trains on and is scored by: rows, how to batch them, and the metric to choose checkpoints by.

    `decide` turns a model's outputs into predictions, `score` these and the labels into metrics. A task whose answers
    are not read off one row of outputs gives `examine` instead, which makes of a model and "validation" or "test" the
    predictions, the metrics and the right answers; checkpoints are then chosen by the loss. `trainer`, `arguments` and
    `options` are for another of transformers' trainers than the plain one.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    collate: Any
    metric: Metric
    lengths: Sequence[int]
    score: Callable[[Any, Any], dict[str, float]] | None = None
    decide: Callable[[Any], list[Any]] | None = None
    examine: Callable[[Any, str], tuple[list[Any], dict[str, float], list[Any]]] | None = None
    trainer: type[Loop] | None = None
    arguments: Callable[..., TrainingArguments] = TrainingArguments
    options: Mapping[str, Any] = field(default_factory=dict)

    def measured(self, output: Any) -> dict[str, float]:
        """The metrics of a trainer's predictions."""
        assert self.score is not None
        assert self.decide is not None
        return self.score(self.decide(output.predictions), output.label_ids)

    def examined(self, trainer: Any, split: str) -> tuple[list[Any], dict[str, float], list[Any]]:
        """Predictions, metrics and right answers of a trainer's model on a split."""
        if self.examine is not None:
            return self.examine(trainer.model, split)
        output = trainer.predict(getattr(self, split))
        assert self.decide is not None
        return self.decide(output.predictions), self.measured(output), np.asarray(output.label_ids).tolist()


def likeliest(logits: Any) -> list[int]:
    """The class of the greatest logit, from (examples, classes)."""
    classes: list[int] = np.asarray(logits).argmax(-1).tolist()
    return classes


def class_scores(predicted: Any, labels: Any) -> dict[str, float]:
    """Accuracy and Matthews correlation of predicted classes (examples,) against labels (examples,)."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def regression_scores(predicted: Any, labels: Any) -> dict[str, float]:
    """Pearson and Spearman correlation of predicted numbers (examples,) with the labels (examples,).

    Equal predictions correlate with nothing: they score 0, where the formula has no value.
    """
    from scipy.stats import pearsonr, spearmanr

    predicted, labels = np.asarray(predicted, dtype=float), np.asarray(labels, dtype=float)
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, labels).statistic),
        "spearman": float(spearmanr(predicted, labels).statistic),
    }


class LengthGrouped(Sampler[int]):
    """A shuffle in which a batch holds texts of like length, so little is padded.

    The order depends on seed and epoch alone, never on the global generator: a run resumed in the middle of
    an epoch sees the rest of the very same order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, grouped: bool) -> None:
        self.lengths, self.batch_size, self.seed, self.grouped = lengths, batch_size, seed, grouped
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        if not self.grouped:
            return iter(order.tolist())
        # Sorting within pools of 50 batches keeps the batches random from epoch to epoch.
        pool = 50 * self.batch_size
        batches: list[Any] = []
        for start in range(0, len(order), pool):
            chunk = order[start : start + pool]
            chunk = chunk[np.argsort([self.lengths[i] for i in chunk], kind="stable")]
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        # A short last batch stays last, or every batch after it would straddle two groups.
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in generator.permutation(len(batches))] + short
        return iter(np.concatenate(shuffled).tolist())


class Loop(Trainer):  # type: ignore[misc]
    """transformers' Trainer with a head learning rate, an order that survives resuming, and a stop at NaN."""

    def __init__(self, settings: Train, lr: float, head: Sequence[str], lengths: Sequence[int], **kwargs: Any) -> None:
        self.settings, self.lr, self.head, self.lengths = settings, lr, head, lengths
        super().__init__(**kwargs)

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a group each for adapter and head, each with and without weight decay."""
        if self.optimizer is None:
            model = model if model is not None else self.model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((is_head(name, self.head), name in decayed), []).append(parameter)
            lr_head = self.settings.lr_head or self.lr
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "lr": lr_head if in_head else self.lr,
                        "weight_decay": self.settings.weight_decay if decay else 0.0,
                    }
                    for (in_head, decay), parameters in groups.items()
                ],
                lr=self.lr,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return LengthGrouped(self.lengths, self.settings.batch_size, self.settings.seed, self.settings.group_by_length)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step; raises TrainingDiverged at a loss that is not finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise diverged(f"the training loss is {loss.item()}", self.state.global_step + 1, self.args.output_dir)
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir)
        part = folder / f"checkpoint-{self.state.global_step}"
        try:
            with storing(f"the checkpoint of step {self.state.global_step} in {folder}"):
                super()._save_checkpoint(*args, **kwargs)
        except StorageError:
            shutil.rmtree(part, ignore_errors=True)  # makes room, and leaves the one before as the last
            raise

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores of a split; raises TrainingDiverged, before a save, where the loss is not finite."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise diverged(f"the validation loss is {loss}", self.state.global_step, self.args.output_dir)
        return metrics


def is_head(name: str, head: Sequence[str]) -> bool:
    """Whether the parameter `name` belongs to one of the modules in `head`."""
    return any(f".{part}." in f".{name}." for part in head)


def diverged(what: str, step: int, folder: str) -> TrainingDiverged:
    """The error for a loss that is not a number at `step`."""
    last = last_checkpoint(Path(folder))
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return TrainingDiverged(f"{what} at step {step}: lower train.lr, or raise train.warmup_ratio; {kept}")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one cut off while it was written is removed.

    Trainer writes `trainer_state.json` last, so a checkpoint that has it has all.
    """
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if newest is None:
        return None
    try:
        read_json(Path(newest) / "trainer_state.json")
    except ValueError:
        shutil.rmtree(newest)
        return last_checkpoint(folder)
    return Path(newest)


class _Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar, the seconds spent over all sessions of a run, and a checkpoint at Ctrl-C.

    `seconds` are those of training with all that belongs to it, `stepping` those of its steps alone.
    """

    def __init__(self, title: str, folder: Path, metric: Metric) -> None:
        self.title, self.folder, self.metric = title, folder, metric
        self.interrupted = False
        self.before, self.started = 0.0, time.perf_counter()
        self.stepping, self.step_started = 0.0, 0.0
        self.bar: Any = None

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        spent = self.folder / "seconds.json"
        if state.global_step and spent.exists():
            self.before, self.stepping = read_json(spent).get(str(state.global_step), (0.0, 0.0))
        self.bar = tqdm(
            disable=not processes.is_main(),
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            dynamic_ncols=True,
            # Where the output is a file a bar every tenth of a second fills it.
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stepping += time.perf_counter() - self.step_started
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True  # the last step is scored wherever it falls
        # At the end of an epoch the checkpoint is left to the epoch's own end, which scores before it saves.
        if self.interrupted and not (args.eval_strategy == "epoch" and float(state.epoch).is_integer()):
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.bar.set_postfix({"loss": f"{logs['loss']:.3f}"}, refresh=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.bar.set_postfix({f"validation {self.metric}": f"{metrics[f'eval_{self.metric}']:.3f}"})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if processes.is_main():
            self._note(state)
        # Left from here, not by `should_training_stop`: that would score and save once more in mid-epoch.
        if self.interrupted and state.global_step < state.max_steps:
            raise Interrupted(str(self.folder))

    def _note(self, state: Any) -> None:
        # Trainer pickles its own arguments beside each checkpoint; nothing here reads a pickle.
        (self.folder / f"checkpoint-{state.global_step}" / "training_args.bin").unlink(missing_ok=True)
        spent = self.folder / "seconds.json"
        known = read_json(spent) if spent.exists() else {}
        write_json(spent, {**known, str(state.global_step): (self.seconds, self.stepping)})

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


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the model at its best checkpoint, scores, and the course of training."""

    model: Any
    validation: dict[str, float] | None
    test: dict[str, float]
    predictions: list[int]
    curve: list[dict[str, float]]
    best_step: int
    seconds: float
    references: list[Any] = field(default_factory=list)
    tokens_per_second: float | None = None
    untrained: dict[str, float] | None = None


def train(
    model: Any,
    task: Encoded,
    settings: Train,
    lr: float,
    head: Sequence[str],
    folder: Path,
    title: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Train `model` on a task, continuing from the last checkpoint in `folder` where there is one.

    Raises TrainingDiverged at a loss that is not finite, Interrupted at Ctrl-C once a checkpoint is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    watched = bool(task.validation)
    every = "steps" if settings.eval_steps else "epoch"
    progress = _Progress(title, folder, task.metric)
    per_epoch = math.ceil(len(task.train) / settings.batch_size)
    arguments = task.arguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=processes.share_of(settings.batch_size // settings.gradient_accumulation),
        gradient_accumulation_steps=settings.gradient_accumulation,
        **{_CHECKPOINTING: settings.gradient_checkpointing},
        per_device_eval_batch_size=settings.eval_batch_size,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_steps or settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        eval_strategy=every if watched else "no",
        save_strategy=every,
        eval_steps=settings.eval_steps,
        save_steps=settings.eval_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=watched and settings.select_best,
        metric_for_best_model=task.metric if watched else None,
        greater_is_better=task.metric not in LESS_IS_BETTER if watched else None,
        logging_steps=max(1, min(10, per_epoch // 4)),
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        use_cpu=processes.on_cpu(),
    )
    regularizers = [regularization_callback()] if has_regularization(model) else []
    trainer = (task.trainer or Loop)(
        settings,
        lr,
        head,
        task.lengths,
        model=model,
        args=arguments,
        data_collator=task.collate,
        train_dataset=task.train,
        eval_dataset=task.validation or None,
        compute_metrics=task.measured if task.examine is None else None,
        callbacks=[progress, *regularizers, *callbacks],
        **task.options,
    )
    trainer.remove_callback(PrinterCallback)
    if processes.is_main():
        last_checkpoint(folder)  # removes what was cut off
    processes.meet()
    resume = last_checkpoint(folder)
    try:
        with progress.catching_interrupts(), quiet():
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        progress.close()
    seconds = progress.seconds
    validation = task.examined(trainer, "validation")[1] if watched else None
    predictions, test, references = task.examined(trainer, "test")
    state = trainer.state
    chosen = watched and settings.select_best and state.best_global_step
    return Outcome(
        model=trainer.model,
        validation=validation,
        test=test,
        predictions=predictions,
        curve=_curve(state.log_history),
        best_step=state.best_global_step if chosen else state.global_step,
        seconds=seconds,
        references=references,
        tokens_per_second=sum(task.lengths) * state.epoch / progress.stepping if progress.stepping else None,
    )


def _curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Trainer's log without what depends on the speed of the machine."""
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    timed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    curve = []
    for entry in history:
        row = {key: entry[key] for key in kept if key in entry}
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            if name != key and name not in timed:
                row[f"validation_{name}"] = value
        if len(row) > 2:
            curve.append({key: value for key, value in row.items() if math.isfinite(value)})
    return curve
