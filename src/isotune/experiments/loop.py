"""One training run through transformers' Trainer: two learning rates, a calm bar, safe to interrupt."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from isotune.experiments import processes
from isotune.experiments.encoded import Encoded, LengthGrouped
from isotune.experiments.files import StorageError, storing
from isotune.experiments.measure import peak_memory
from isotune.experiments.progress import Progress, diverged, last_checkpoint, prepare_to_resume
from isotune.experiments.recipe import LESS_IS_BETTER
from isotune.experiments.run import Run
from isotune.experiments.stopping import SuccessiveHalving
from isotune.experiments.tracking import tracked
from isotune.files.base_model import quiet
from isotune.moving import MovingSchedule, UoraSchedule
from isotune.tools.regularization import has_regularization, regularization_callback

_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in TrainingArguments.__annotations__
)
"""What transformers calls activation checkpointing; where it knows the first name, the second is deprecated."""


class Loop(Trainer):  # type: ignore[misc]
    """transformers' Trainer with a head learning rate, an order that survives resuming, and a stop at NaN."""

    def __init__(
        self, run: Run, progress: Progress, head: Sequence[str], lengths: Sequence[int], **kwargs: Any
    ) -> None:
        self.run, self.settings, self.head, self.lengths = run, run.settings, head, lengths
        self.progress = progress
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
            lr_head = self.settings.lr_head or self.run.lr
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "lr": lr_head if in_head else self.run.lr,
                        "weight_decay": self.settings.weight_decay if decay or self.settings.decay_all else 0.0,
                    }
                    for (in_head, decay), parameters in groups.items()
                ],
                lr=self.run.lr,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return LengthGrouped(self.lengths, self.settings.batch_size, self.settings.seed, self.settings.group_by_length)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step; raises TrainingDiverged where the loss is not finite."""
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
        if self.args.should_save:
            self._keep_two(part)

    def _keep_two(self, last: Path) -> None:
        """Remove checkpoints but the last and the best, or the one before; by their steps, and not by a clock."""
        rotate_checkpoints(str(last.parent), 2, self.state.best_model_checkpoint, use_mtime=False)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores of a split; raises TrainingDiverged where the loss is not finite, and nothing is saved then."""
        with self.progress.evaluation():  # callbacks that measure besides included
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise diverged(f"the validation loss is {loss}", self.state.global_step, self.args.output_dir)
        return metrics


def is_head(name: str, head: Sequence[str]) -> bool:
    """Whether the parameter `name` belongs to one of the modules in `head`."""
    return any(f".{part}." in f".{name}." for part in head)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the model at its best checkpoint, scores, and the course of training."""

    model: Any
    validation: dict[str, float] | None
    test: dict[str, float]
    predictions: list[Any]
    curve: list[dict[str, float]]
    best_step: int
    seconds: float
    """Of training alone."""
    evaluation_seconds: float
    """Of what was measured on the way."""
    tokens_per_second: float | None = None
    peak_memory: int | None = None
    stopped: dict[str, Any] | None = None
    """Where a search gave the run up: it has no score on the test data then, and what it trained is of no use."""


def train(
    model: Any, task: Encoded, run: Run, head: Sequence[str], callbacks: Sequence[TrainerCallback] = ()
) -> Outcome:
    """Train a model, with an adapter where the method is one, going on from the last checkpoint in the run's folder.

    Args:
        head: names of the modules that are trained with the head's learning rate.
        callbacks: transformers' callbacks to call besides.

    Raises:
        TrainingDiverged: a loss is not finite.
        Interrupted: Ctrl-C, once a checkpoint is written.
        StorageError: a checkpoint cannot be written.
    """
    settings, folder = run.settings, run.folder
    folder.mkdir(parents=True, exist_ok=True)
    watched = bool(task.validation)
    every = "steps" if settings.eval_steps else "epoch"
    progress = Progress(run.title, folder, task.metric)
    per_epoch = math.ceil(len(task.train) / settings.batch_size)
    if processes.is_main():
        prepare_to_resume(folder)
    processes.wait_for_all()
    resume = last_checkpoint(folder)
    regularizers = [regularization_callback()] if has_regularization(model) else []
    hopeless = [SuccessiveHalving(run)] if watched and run.earlier else []
    schedules: list[Any] = [MovingSchedule(**settings.moving.model_dump())] if settings.moving else []
    schedules += [UoraSchedule(**settings.reinit.model_dump())] if settings.reinit else []
    with tracked(run) as tracking:
        arguments = task.arguments(
            output_dir=str(folder),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            per_device_train_batch_size=processes.share_of(settings.batch_size // settings.gradient_accumulation),
            gradient_accumulation_steps=settings.gradient_accumulation,
            **{_CHECKPOINTING: settings.gradient_checkpointing},
            per_device_eval_batch_size=settings.eval_batch_size,
            learning_rate=run.lr,
            lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
            warmup_steps=settings.warmup_steps or settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.autocast,
            seed=settings.seed,
            eval_strategy=every if watched else "no",
            save_strategy=every,
            eval_steps=settings.eval_steps,
            save_steps=settings.eval_steps or 500,
            load_best_model_at_end=watched and settings.select_best,
            metric_for_best_model=task.metric if watched else None,
            greater_is_better=task.metric not in LESS_IS_BETTER if watched else None,
            logging_steps=max(1, min(10, per_epoch // 4)),
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            use_cpu=processes.on_cpu(),
            **tracking,
        )
        trainer = (task.trainer or Loop)(
            run,
            progress,
            head,
            task.lengths,
            model=model,
            args=arguments,
            data_collator=task.collate,
            train_dataset=task.train,
            eval_dataset=task.validation or None,
            compute_metrics=task.measured if task.examine is None else None,
            callbacks=[progress, *regularizers, *schedules, *hopeless, *callbacks],
            **task.options,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            with progress.catching_interrupts(), quiet():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            progress.close()
    if "forward" in vars(trainer.model):
        # Without autocast, so that what is measured from here on is what the model does when it is loaded again.
        trainer.model = extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False)
    seconds, peak = progress.seconds, peak_memory()  # before what follows, which is no part of the training
    state = trainer.state
    stopped = next((one.stopped for one in hopeless), None)
    validation = task.examined(trainer, "validation")[1] if watched else None
    predictions, test = task.examined(trainer, "test") if stopped is None else ([], {})
    chosen = watched and settings.select_best and state.best_global_step
    return Outcome(
        model=trainer.model,
        validation=validation,
        test=test,
        predictions=predictions,
        curve=_curve(state.log_history),
        best_step=state.best_global_step if chosen else state.global_step,
        seconds=seconds,
        evaluation_seconds=progress.evaluating,
        peak_memory=peak,
        tokens_per_second=sum(task.lengths) * state.epoch / progress.stepping if progress.stepping else None,
        stopped=stopped,
    )


def _curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Trainer's log without what depends on the speed of the machine."""
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "forgetting")
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
