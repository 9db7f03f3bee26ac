"""The runs of an experiment: which there are, which have been done, and what they come to."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from isotune.experiments import processes
from isotune.experiments.claim import alone, claim, identity
from isotune.experiments.files import read_object, write_json
from isotune.experiments.outcome import MethodResult, best_rate, method_result, rows_of, with_titles
from isotune.experiments.rates import Given, Search
from isotune.experiments.recipe import LESS_IS_BETTER, Method, Recipe, RecipeError, Train, merit
from isotune.experiments.records import FORMAT, Record, read_run, record_of
from isotune.experiments.run import Run
from isotune.experiments.tasks.task import Task
from isotune.experiments.text import shown

Key = tuple[str, float | None, int]


@dataclass(frozen=True)
class Variant:
    """A method with its options, under a label of its own, and how its learning rate is found."""

    label: str
    method: Method
    search: Search

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried in any case."""
        return next(self.search.stages(lambda rate: None))

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9=.,\[\]-]+", "_", self.label)


@dataclass
class Schedule:
    """What an experiment consists of, and what of it has been done.

    Each variant is trained with the first seed at the rates of its search, then at the best of them with the others.

    Args:
        threads: of a run; None leaves them as they are.
        keep_adapters: whether the trained weights stay.
        training: whether a recipe is trained, and not compared: a run then has one folder, which keeps what it trained
            beside its record, `run.json`. The records of a comparison lie apart from what its runs write, which can
            then be removed: `runs/`, `work/` and `heads/`.
        notes: what the user should know before it starts.
        details: what `result` says besides of how the comparison was made.

    Raises:
        RecipeError: two variants have one folder, or rates are to be chosen without a validation set.
    """

    name: str
    recipe: Recipe
    variants: list[Variant]
    seeds: list[int]
    folder: Path
    task: Task
    threads: int | None = None
    keep_adapters: bool = False
    training: bool = False
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    records: dict[Key, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folders = [variant.folder for variant in self.variants]
        twice = next((variant.label for variant in self.variants if folders.count(variant.folder) > 1), None)
        if twice is not None:
            more = "; isotune compare trains one method with several options" if self.training else ""
            raise RecipeError(f"the method {twice} is given twice{more}")
        if not self.task.sizes["validation"] and any(variant.search.runs > 1 for variant in self.variants):
            one = "one train.lr" if self.training else "--lr-search 1"
            raise RecipeError(f"learning rates are chosen on a validation set, and there is none: give one, or {one}")

    @cached_property
    def about(self) -> dict[str, Any]:
        """What a record says of the data, with their sizes and fingerprint."""
        return self.task.described()

    @property
    def _another_folder(self) -> str:
        """What is given on the command line for another folder."""
        return "output=FOLDER" if self.training else "-o FOLDER"

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep other commands from the folder, where this is the main process; entering raises RecipeError."""
        return alone(self.folder, self._another_folder) if processes.is_main() else contextlib.nullcontext()

    def begin(self) -> None:
        """Take the folder for this experiment, and read what of it has been done.

        Raises:
            RecipeError: the folder holds something else, or a record of other settings.
            ValueError: a record cannot be read; the message names it.
        """
        if processes.is_main():
            own = identity(self.recipe, self.about["fingerprint"], methods=self.training)
            claim(self.folder, own, self._another_folder)
        processes.wait_for_all()
        # A search may have to be read before the best rate is known, and with it which further runs there are.
        while [run for run in self._possible() if run.key not in self.records and self._read(run)]:
            pass

    @cached_property
    def heads(self) -> dict[int, Run]:
        """The heads that runs start from where the recipe asks for that, by seed.

        In a training these are the runs of the method head itself.
        """
        if not self.recipe.train.start_from_head or self.training:
            return {}
        method = next(m for m in self.recipe.baselines if m.name == "head")
        lr = self.recipe.training(method).lr[0]
        return {seed: self._run("start", Variant("start:head", method, Given((lr,))), lr, seed) for seed in self.seeds}

    def search(self, variant: Variant) -> list[Run]:
        """The runs that find a method's learning rate, as far as it is known which there are."""
        found: list[Run] = []
        for stage in variant.search.stages(lambda lr: self._merit(variant, lr)):
            earlier = tuple(found)
            found += [self._run("search", variant, lr, self.seeds[0], earlier) for lr in stage]
        return found

    def _merit(self, variant: Variant, lr: float) -> float | None:
        """How good a rate of a search was, the more the better; None while its run has not ended."""
        record = self.records.get((variant.label, lr, self.seeds[0]))
        if record is None:
            return None
        return -math.inf if record.lost else merit(self.recipe.chosen_by, record.validation)

    def best(self, variant: Variant) -> float | None:
        """The rate with the highest score on validation; None while runs are missing, or where all have failed."""
        searched = [self.records.get(run.key) for run in self.search(variant)]
        found = [record for record in searched if record is not None]
        return best_rate(found, self.recipe.chosen_by) if len(found) == len(searched) else None

    def total(self) -> int:
        """How many runs the whole experiment has, as far as is known; failed searches are not foreseen."""
        return len(self.heads) + sum(len(self.search(v)) + len(self.seeds) - 1 for v in self.variants)

    def ready(self) -> Iterator[Run]:
        """The runs that can be started and have not been done: heads, searches, then seed after seed."""
        left = [run for run in self._possible() if run.key not in self.records]
        needed = {run.seed for run in left if run.start_from}
        for head in self.heads.values():
            if head.key not in self.records or (head.needs_weights and head.seed in needed):
                yield head
        for run in left:
            start = self.heads.get(run.seed) if run.start_from else None
            if start is None:
                if run.phase != "start":
                    yield run
            elif not start.needs_weights and start.key in self.records and self.records[start.key].failed is None:
                yield run

    def _possible(self) -> Iterator[Run]:
        yield from self.heads.values()
        for variant in self.variants:
            yield from self.search(variant)
        best = {variant.label: self.best(variant) for variant in self.variants}
        for seed in self.seeds[1:]:
            for variant in self.variants:
                lr = best[variant.label]
                if lr is not None:
                    yield self._run("seed", variant, lr, seed)

    def _run(self, phase: str, variant: Variant, lr: float, seed: int, earlier: Sequence[Run] = ()) -> Run:
        method = variant.method.model_copy(update={"train": {**variant.method.train, "lr": [lr], "seed": seed}})
        where, start_from = self.folder.resolve(), None
        if self.training:
            name = variant.folder if variant.search.runs == 1 else f"{variant.folder}-lr={lr:g}"
            folder, record, start_from = where / name, where / name / "run.json", self._trained_head(method)
        else:
            name = f"{variant.folder}/lr={lr:g}-seed={seed}"
            folder, record = where / "work" / name, where / "runs" / f"{name}.json"
            if phase == "start":
                name = f"heads/lr={lr:g}-seed={seed}"
                folder, record = where / name, where / f"{name}.json"
            elif method.name != "head" and seed in self.heads:
                start_from = self.heads[seed].folder
        return Run(
            name=self.name,
            label=variant.label,
            phase=phase,
            recipe=self.recipe.model_copy(update={"method": method}),
            lr=lr,
            seed=seed,
            fingerprint=self.about["fingerprint"],
            folder=folder,
            logs=where / "logs" / name,
            record=record,
            untrained=where / "untrained" / f"seed={seed}.json",
            start_from=start_from,
            threads=self.threads,
            search=variant.search.described,
            earlier=tuple(run.record for run in earlier),
        )

    def _trained_head(self, method: Method) -> Path | None:
        """The folder of this experiment's own method head, where it has been trained and `method` is another one."""
        head = next((variant for variant in self.variants if variant.method.name == "head"), None)
        lr = self.best(head) if head is not None and method.name != "head" else None
        return None if head is None or lr is None else self._run("search", head, lr, self.seeds[0]).folder

    def _read(self, run: Run) -> bool:
        path = run.record
        if not path.exists():
            return False
        content = read_run(path)
        if "settings" in content:
            try:
                # A later release may know more settings; what an earlier one has stored then had their defaults.
                content["settings"] = Train.model_validate(content["settings"]).described()
            except ValueError as error:
                raise RecipeError(f"cannot read {path}: its settings are none that this release knows") from error
        for key, value in run.identity().items():
            # A training of an earlier release has stored less. The folder was claimed for what the recipe holds,
            # whatever it is called.
            if key not in ("phase", "recipe") and key in content and content[key] != value:
                raise RecipeError(
                    f"{path} is of a run with other settings ({key} is {shown(content[key])} there and {shown(value)} "
                    "here); give another folder with -o, or remove that one"
                )
        record = record_of({**run.identity(), **content}, path)
        if not (run.is_over(content) or record.final):
            return False
        self.records[run.key] = record
        return True

    def add_record(self, run: Run, content: dict[str, Any]) -> None:
        """Note the record of a run that has ended, and remove what it needed only to go on."""
        self.records[run.key] = record = record_of(content, run.record)
        if not processes.is_main():
            return
        if not run.record.exists() or read_object(run.record) != content:
            write_json(run.record, content)
        if record.failed is None and run.phase != "start" and not (self.keep_adapters or self.training):
            shutil.rmtree(run.folder, ignore_errors=True)

    def _result(self, variant: Variant) -> MethodResult:
        records = [record for (label, _, _), record in self.records.items() if label == variant.label]
        runs = self.search(variant)
        searched = [self.records[run.key] for run in runs if run.key in self.records]
        lr = self.best(variant)
        failed: str | None = None
        if lr is None and len(searched) == len(runs):
            failed = f"at every learning rate; at the first: {searched[0].failed}"
        broken = [self.records[head.key].failed for head in self.heads.values() if head.key in self.records]
        if any(broken) and variant.method.name != "head":
            failed = f"the head to start from: {next(filter(None, broken))}"
        reasons = [record.failed for record in records if record.failed is not None and record.lr == lr]
        if lr is not None and reasons:
            failed = f"{len(reasons)} of {len(self.seeds)} seeds: {reasons[0]}"
        method = {"name": variant.method.name, **variant.method.options}
        return method_result(
            variant.label, records, method=method, lr=lr, tried=[run.lr for run in runs], failed=failed
        )

    def result(self) -> dict[str, Any]:
        """The experiment as JSON, as far as it has come."""
        return {
            "format": FORMAT,
            "recipe": self.name,
            "task": self.recipe.task,
            "model": self.recipe.model,
            "metric": self.recipe.metric,
            "chosen_by": self.recipe.chosen_by,
            "higher_is_better": self.recipe.metric not in LESS_IS_BETTER,
            "variants": [variant.label for variant in self.variants],
            "seeds": self.seeds,
            **self.details,
            "data": self.about,
            "complete": not any(True for _ in self.ready()),
            "rows": rows_of(with_titles([self._result(variant) for variant in self.variants])),
        }
