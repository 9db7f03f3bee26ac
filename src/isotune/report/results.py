"""Reading the folder of a comparison or a training: its runs, and what each method came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from isotune.experiments import paper, scores
from isotune.experiments.files import read_object
from isotune.experiments.outcome import MethodResult, best_rate, differences, method_result, with_titles
from isotune.experiments.recipe import LESS_IS_BETTER
from isotune.experiments.records import (
    RESULT,
    Number,
    Object,
    Part,
    Rate,
    Record,
    Text,
    Whole,
    parse,
    read_run,
    record_of,
)
from isotune.experiments.text import printable


@dataclass(frozen=True)
class Comparison:
    """Methods side by side on one task."""

    folder: Path
    recipe: str
    task: str
    model: str
    metric: str
    higher_is_better: bool
    seeds: Sequence[int]
    command: str
    data: Mapping[str, Any]
    match_params: float | None
    variants: Sequence[MethodResult]
    runs: Sequence[Record]
    """All of them, also those that failed."""
    chosen_by: str
    """The validation metric that learning rates were compared by."""
    notes: Sequence[str] = ()
    """What is missing, a sentence each."""
    foreign: bool = False
    """Whether another library's command made it, and its own results may stand in it: methods go by whole titles."""

    @property
    def metric_name(self) -> str:
        """The metric in words."""
        return self.metric.replace("_", " ")

    @property
    def scored(self) -> list[MethodResult]:
        """The methods that have a result."""
        return [variant for variant in self.variants if variant.mean is not None]

    @cached_property
    def best(self) -> MethodResult | None:
        """The method with the best mean."""
        return next(iter(self.ranked(self.scored)), None)

    @property
    def sign(self) -> float:
        """What makes of scores numbers of which more is better."""
        return 1.0 if self.higher_is_better else -1.0

    def ranked(self, variants: Sequence[MethodResult]) -> list[MethodResult]:
        """Methods, best first, and after them those without a result."""
        return sorted(variants, key=lambda variant: (variant.mean is None, -self.sign * (variant.mean or 0.0)))

    def near_best(self, variant: MethodResult) -> bool:
        """Whether a method other than the best is within one standard error, the best's own, of the best."""
        best = self.best
        if best is None or variant is best or best.mean is None or best.standard_error is None or variant.mean is None:
            return False
        return abs(best.mean - variant.mean) <= best.standard_error

    @cached_property
    def differences(self) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
        """The method that others are set against example by example, and the differences by label."""
        return differences(self.variants)

    @cached_property
    def parts(self) -> list[str]:
        """The test sets, where the score is a mean over several."""
        return list(dict.fromkeys(name for run in self.runs for name in run.parts))

    def paper_of_part(self, part: str) -> dict[str, paper.PaperFigure]:
        """What the paper reports for one of several test sets."""
        return paper.figures(f"{self.recipe.rpartition('/')[0]}/{part}")

    @cached_property
    def paper(self) -> dict[str, paper.PaperFigure]:
        """What the paper reports for this task, by our name of the method."""
        return paper.figures(self.recipe)

    def shown(self, score: float | None, error: float | None = None) -> str:
        """A score as people read it, with its standard error where that is given."""
        return scores.score(self.metric, score, error)


class _Row(Part):
    """What `comparison.json` says of a method."""

    label: Text
    method: Object = Field(default_factory=dict)
    lr: Rate = None
    failed: Text = ""


class _Head(Part):
    """What `comparison.json` says of the whole."""

    recipe: Text = ""
    task: Text = ""
    model: Text = ""
    metric: Text = ""
    chosen_by: Text = ""
    higher_is_better: bool | None = None
    variants: list[Text] = Field(default_factory=list)
    seeds: list[Whole] = Field(default_factory=list)
    match_params: Number = None
    command: Text = ""
    data: Object = Field(default_factory=dict)
    complete: bool = True
    rows: list[_Row] = Field(default_factory=list)


class _Training(Part):
    """What the `result.json` of an earlier release says of a training."""

    recipe: Object
    runs: list[Object]


def read(folder: Path) -> Comparison:
    """Read the folder of a comparison or a training, finished or not.

    Args:
        folder: what `isotune compare` or `isotune train` wrote, `comparison.json` and a record for each run, or the
            `result.json` of an earlier release. Fields that are not there are left out of the report, and what was
            stopped before `comparison.json` was written is put together from its runs.

    Raises:
        ValueError: there is neither, or a file is damaged or holds what it should not; names it.
    """
    path = folder / RESULT
    head = parse(_Head, read_object(path) if path.exists() else {}, path)
    records = _records(folder)
    if not path.exists() and not records:
        raise ValueError(_nothing_in(folder))
    first = next((record for record in records if record.metric), Record())
    metric = head.metric or first.metric or "accuracy"
    data = head.data or first.data
    records = [
        record.model_copy(update={"metric": metric, "data": data, "label": record.label or _label(record)})
        for record in records
    ]
    # A task whose answers are generated may choose by the loss, as generating takes long.
    guessed = metric if any(metric in record.validation for record in records) else "loss"
    chosen_by = head.chosen_by or guessed
    rows = {row.label: row for row in head.rows}
    labels = list(dict.fromkeys([*(head.variants or rows), *(r.label for r in records if r.phase != "start")]))
    variants = with_titles(
        [_variant(label, [r for r in records if r.label == label], rows.get(label), chosen_by) for label in labels]
    )
    seeds = head.seeds or sorted({record.seed for record in records})
    higher = metric not in LESS_IS_BETTER if head.higher_is_better is None else head.higher_is_better
    return Comparison(
        folder=folder,
        recipe=head.recipe or first.recipe or printable(folder.name),
        task=head.task or first.task,
        model=head.model or first.model,
        metric=metric,
        higher_is_better=higher,
        seeds=seeds,
        command=head.command,
        data=data,
        match_params=head.match_params,
        variants=variants,
        runs=records,
        chosen_by=chosen_by,
        notes=_notes(head, variants, seeds, path.exists() or not (folder / "runs").exists()),
    )


def _records(folder: Path) -> list[Record]:
    """The records of all runs: of a comparison in `runs/`, of a training beside what each has trained."""
    found = [
        record_of(read_run(run), run)
        for pattern in ("runs/*/*.json", "*/run.json")
        for run in sorted(folder.glob(pattern))
        if run.name == "run.json" or run.name.startswith("lr=")
    ]
    old = folder / "result.json"
    if found or not old.exists():
        return found
    content = read_object(old)
    training = parse(_Training, content, old)
    known = {key: content.get(key) for key in ("metric", "data", "seed", "versions", "hardware")} | {
        "recipe": folder.name,
        "task": training.recipe.get("task"),
        "model": training.recipe.get("model"),
        "phase": "search",
    }
    # An earlier release stored with a run only what differs from run to run.
    return [record_of({**known, **run}, old) for run in training.runs]


def _label(record: Record) -> str:
    """The label of a run whose record has none."""
    return record.path.parent.name if record.path.parent.parent.name == "runs" else str(record.method.get("name"))


def _nothing_in(folder: Path) -> str:
    """What is said of a folder without results: where there are some below it, or what such a folder is."""
    below = sorted({path.parent for name in (RESULT, "result.json") for path in folder.glob(f"*/**/{name}")})
    if not below:
        return f"{folder} holds no results; give a folder that `isotune compare` or `isotune train` wrote ({RESULT})"
    named = ", ".join(map(str, below[:10])) + (f" and {len(below) - 10} more" if len(below) > 10 else "")
    return f"{folder} holds no results itself, and there are some below it: give {named}"


def _variant(label: str, records: Sequence[Record], row: _Row | None, chosen_by: str) -> MethodResult:
    search = [record for record in records if record.phase == "search"]
    lr = row.lr if row is not None and row.lr is not None else best_rate(search or records, chosen_by)
    failures = [record.failed for record in records if record.failed is not None]
    at_best = [r.failed for r in records if r.failed is not None and r.lr == lr]
    done = any(record.failed is None and record.lr == lr for record in records)
    failed = (row.failed if row is not None else "") or next(iter(at_best if done else failures), None)
    method = next((record.method for record in records if record.method), row.method if row is not None else {})
    return method_result(label, records, method=method or {"name": label.partition(":")[0]}, lr=lr, failed=failed)


def _notes(head: _Head, variants: Sequence[MethodResult], seeds: Sequence[int], whole: bool) -> list[str]:
    notes = []
    if not whole:
        notes.append("comparison.json is not there: what is shown is put together from the runs that are.")
    elif not head.complete:
        notes.append("The comparison is not finished; the command below goes on with it.")
    notes += [f"{variant.title} failed: {variant.failed}" for variant in variants if variant.failed is not None]
    untouched = [v.title for v in variants if v.failed is None and not v.runs]
    if untouched:
        notes.append(f"Not run yet: {', '.join(untouched)}.")
    short = [f"{v.title} {len(v.runs)}" for v in variants if v.failed is None and 0 < len(v.runs) < len(seeds)]
    if short:
        notes.append(f"Of {len(seeds)} seeds there are fewer: {', '.join(short)}.")
    return notes
