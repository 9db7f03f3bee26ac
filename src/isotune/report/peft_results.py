"""PEFT's own benchmark, method_comparison in the repository huggingface/peft: its result files as comparisons.

A result file is what PEFT's run.py writes of one training, of any method that PEFT knows, isotune's registered ones
included. A condensed file holds the facts of many of PEFT's published ones, with their source, in the same form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, Field

from isotune.experiments.files import read_json, read_object
from isotune.experiments.loading import over
from isotune.experiments.outcome import MethodResult, method_result, with_titles
from isotune.experiments.records import (
    RESULT,
    Number,
    Object,
    Part,
    Record,
    Scores,
    Text,
    Whole,
    number,
    parse,
    record_of,
)
from isotune.experiments.registry import Entry, entries, entry
from isotune.experiments.text import printable
from isotune.report.results import Comparison

ISOTUNE = "ISOTUNE_"
_NOT_SAVED = 99_999_999
"""The file size that PEFT's run.py notes where the adapter could not be saved."""
_FORGETTING_MENDED = "2026-07-10"
"""When huggingface/peft#3419 mended how the benchmark measures forgetting: figures before are of something else."""


@dataclass(frozen=True)
class _Benchmark:
    title: str
    forgetting: str
    """Whose change is taken for forgetting."""
    test: int | None = None
    """The examples of the test set, where it is the Hub's."""


_BENCHMARKS = {
    "accuracy": _Benchmark("PEFT's MetaMathQA benchmark", "the loss on 100 passages of Wikipedia", 1319),
    "dino_similarity": _Benchmark("PEFT's image benchmark", "the images of other prompts (PEFT's drift)"),
}
"""By the metric of the test."""


def _named(name: str) -> str:
    if not name:
        raise ValueError("METHOD/NAME")
    return name


class _Training(Part):
    model_id: Text = ""
    seed: Whole = 0
    max_steps: Number = None
    batch_size: Number = None
    dtype: Text = ""
    optimizer_kwargs: Object = Field(default_factory=dict)


class _Run(Part):
    experiment_name: Annotated[str, AfterValidator(_named)]
    created_at: Text = ""
    train_config: _Training = _Training()
    peft_config: dict[str, Any] | None = None
    error_msg: Text = ""


class _Measured(Part):
    status: Text = ""
    train_time: Number = None
    accelerator_memory_max: Annotated[
        Number, Field(validation_alias=AliasChoices("accelerator_memory_max", "cuda_memory_max"))
    ] = None
    file_size: Number = None
    num_trainable_params: Number = None
    metrics: list[Scores] = Field(default_factory=list)


class _Meta(Part):
    package_info: Object = Field(default_factory=dict)
    system_info: Object = Field(default_factory=dict)
    dataset_info: Object = Field(default_factory=dict)


class _Result(Part):
    run_info: _Run
    train_info: _Measured
    meta_info: _Meta = _Meta()


class _Source(Part):
    repository: Text
    path: Text
    commit: Text
    note: Text = ""


class _Condensed(Part):
    source: _Source
    shared: Object
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class _Trained:
    """One training, with where it stands."""

    result: _Result
    path: Path
    source: _Source | None
    """Of the condensed file that it is from; None for a file of PEFT's run.py."""

    @property
    def metric(self) -> str | None:
        """What the test measured; what validation did where the training came to no test."""
        names = [name for point in reversed(self.result.train_info.metrics) for name in point]
        return next((n.partition(" ")[2] for kind in ("test ", "valid ") for n in names if n.startswith(kind)), None)

    @property
    def lr(self) -> float | None:
        found = number(self.result.run_info.train_config.optimizer_kwargs.get("lr"))
        return found if found is not None and found > 0 else None

    @property
    def label(self) -> str:
        """The experiment's name, and where it is from."""
        return self.result.run_info.experiment_name + (" (published)" if self.source else "")

    @property
    def method(self) -> Entry:
        """What is known of the method here; of one that is not, its name in capitals."""
        config = self.result.run_info.peft_config
        if config is None:
            return entry("full")
        kind = str(config.get("peft_type", "")).removeprefix(ISOTUNE).lower()
        fitting = [
            one
            for one in entries().values()
            if one.base == kind and all(config.get(name) == value for name, value in one.fixed.items())
        ]
        return max(fitting, key=lambda one: len(one.fixed), default=entry(kind or "adapter"))

    @property
    def title(self) -> str:
        """The method, the end of the experiment's name, and a mark where it is PEFT's."""
        run = self.result.run_info
        own = str((run.peft_config or {}).get("peft_type", "")).startswith(ISOTUNE)
        marks = [*(() if own else ("PEFT",)), *(("published",) if self.source else ())]
        name = run.experiment_name.rpartition("/")[2]
        model = PurePath(run.train_config.model_id).name + "-"
        name = name[len(model) :] if name.lower().startswith(model.lower()) else name
        return f"{self.method.title} {name}" + (f" ({', '.join(marks)})" if marks else "")

    @property
    def gpu(self) -> Any:
        """What it ran on, where that is noted; results of 2025 call it otherwise."""
        system = self.result.meta_info.system_info
        return system.get("accelerator") or system.get("gpu")

    @property
    def from_hub(self) -> bool:
        """Whether its test set is known to be the Hub's, not another of its name."""
        found = self.result.meta_info.dataset_info.get("gsm8k")
        return isinstance(found, dict) and bool(found.get("sha"))

    @property
    def old_forgetting(self) -> bool:
        """Whether its forgetting was measured in the way that PEFT has mended since."""
        created = self.result.run_info.created_at
        return self.metric == "accuracy" and "" < created < _FORGETTING_MENDED

    def record(self, metric: str) -> Record:
        """The training as a record of ours; what PEFT does not measure stays empty."""
        run, measured, meta = self.result.run_info, self.result.train_info, self.result.meta_info
        last = next((point for point in reversed(measured.metrics) if f"test {metric}" in point), {})
        change = last.get("drift", None if self.old_forgetting else last.get("forgetting"))
        curve = [
            {"step": point["step"], "loss": point.get("train loss"), f"validation_{metric}": point[f"valid {metric}"]}
            for point in measured.metrics
            if "step" in point and f"valid {metric}" in point
        ]
        said = run.error_msg.partition("\\n")[0] or f"its status is {measured.status or 'unknown'}"  # the first line
        content = {
            "label": self.label,
            "method": {"name": self.method.name},
            "model": run.train_config.model_id,
            "metric": metric,
            "lr": self.lr,
            "seed": run.train_config.seed,
            "failed": "" if measured.status == "success" else said,
            "test": {metric: last.get(f"test {metric}")},
            "validation": {metric: next((p[f"validation_{metric}"] for p in reversed(curve)), None)},
            "curve": curve,
            "trainable_parameters": measured.num_trainable_params,
            "adapter_bytes": None if measured.file_size == _NOT_SAVED else measured.file_size,
            "train_seconds": measured.train_time,
            "peak_memory_bytes": measured.accelerator_memory_max,
            "forgetting": None if change is None else {"change": change, "measure": _benchmark(metric).forgetting},
            "versions": {
                name.removesuffix("-version"): version
                for name, version in meta.package_info.items()
                if name.endswith("-version")
            },
            "hardware": {"accelerator": self.gpu, "platform": meta.system_info.get("system")},
        }
        return record_of(content, self.path)


def holds_results(path: Path) -> bool:
    """Whether a folder has results of PEFT's benchmark, or files that nobody can read; a JSON file is always one."""
    if path.name == RESULT:
        raise ValueError(f"{path} is a file of `isotune compare` or `isotune train`: give its folder, {path.parent}")
    return path.is_file() or any(_is_result(file) for file in _files(path))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.json"))


def _is_result(file: Path) -> bool:
    try:
        content = read_json(file)
    except ValueError:
        return file.name != "result.json"  # which is ours; what is wrong with another is said when it is read
    return isinstance(content, dict) and ("run_info" in content or {"source", "shared", "results"} <= content.keys())


def read_results(paths: Sequence[Path]) -> list[Comparison]:
    """What PEFT's results come to: a comparison for each metric and model, the files of all folders together.

    Args:
        paths: result files of PEFT's run.py, condensed files, or folders of these.

    Raises:
        ValueError: a file is damaged or is no such result; names it.
    """
    groups: dict[tuple[str, str], list[_Trained]] = {}
    found = [one for path in paths for file in _files(path) for one in _read(file)]
    for one in found:
        model = one.result.run_info.train_config.model_id
        known = (o.metric for o in found if o.result.run_info.train_config.model_id == model and o.metric)
        # A training that failed before its first validation has no metric of its own.
        groups.setdefault((one.metric or next(known, "accuracy"), model), []).append(one)
    return [_comparison(metric, model, group) for (metric, model), group in groups.items()]


def _read(file: Path) -> list[_Trained]:
    content = read_object(file)
    if "results" not in content:
        return [_Trained(parse(_Result, content, file), file, None)]
    condensed = parse(_Condensed, content, file)
    return [
        _Trained(
            parse(_Result, over(condensed.shared, result), file.with_name(f"{file.name}, result {number}")),
            file,
            condensed.source,
        )
        for number, result in enumerate(condensed.results, start=1)
    ]


def _benchmark(metric: str) -> _Benchmark:
    return _BENCHMARKS.get(metric) or _Benchmark(f"PEFT's benchmark ({metric.replace('_', ' ')})", "its forgetting")


def _comparison(metric: str, model: str, trained: Sequence[_Trained]) -> Comparison:
    # Of several trainings of one experiment, rate and seed the last counts.
    by_date = sorted(trained, key=lambda one: one.result.run_info.created_at)
    recorded = [(one, one.record(metric)) for one in by_date]
    groups: dict[tuple[str, float | None], list[tuple[_Trained, Record]]] = {}
    for one, record in recorded:
        groups.setdefault((one.label, one.lr), []).append((one, record))
    labels = [label for label, _ in groups]
    variants = with_titles(
        [
            _variant(groups[label, lr], f"{lr:g}" if lr is not None and labels.count(label) > 1 else "")
            for label, lr in sorted(groups, key=lambda pair: pair[0])
        ]
    )
    runs = [record for _, record in recorded]
    about = _benchmark(metric)
    notes = _differences(by_date)
    if any(run.forgetting is not None for run in runs):
        notes.append(f"Forgetting is the change of {about.forgetting}.")
    notes += [f"{variant.title} failed: {variant.failed}" for variant in variants if variant.failed is not None]
    return Comparison(
        folder=trained[0].path.parent,
        recipe=about.title,
        task="",
        model=model,
        metric=metric,
        higher_is_better=True,
        seeds=sorted({run.seed for run in runs}),
        command="",
        data={"test": about.test} if about.test and all(one.from_hub for one in trained) else {},
        match_params=None,
        variants=variants,
        runs=runs,
        chosen_by=metric,
        notes=notes,
        foreign=True,
    )


def _variant(recorded: Sequence[tuple[_Trained, Record]], rate: str) -> MethodResult:
    """The trainings of one experiment at one rate, a seed each; `rate` where it must be told from another."""
    last, records = recorded[-1][0], [record for _, record in recorded]
    done = {record.seed for record in records if record.failed is None}
    failed = next((r.failed for r in reversed(records) if r.failed is not None and r.seed not in done), None)
    label = last.label + (f" lr={rate}" if rate else "")
    found = method_result(label, records, method={"name": last.method.name}, lr=last.lr, failed=failed)
    return dataclasses.replace(found, title=last.title + (f" at {rate}" if rate else ""))


def _differences(trained: Sequence[_Trained]) -> list[str]:
    """What a reader must know before the rows are compared: sources, and what is not the same for all."""
    notes = [
        f"Those marked published are PEFT's own results, of {source.repository}, {source.path}, commit {source.commit}"
        + (f". {source.note}." if source.note else ".")
        for source in dict.fromkeys(one.source for one in trained if one.source is not None)
    ]
    facts: list[tuple[str, str, Callable[[_Trained], Any]]] = [
        ("The GPU", ", so compare times and memory only of the same one", lambda one: one.gpu),
        ("The version of PEFT", "", lambda one: one.result.meta_info.package_info.get("peft-version")),
        ("The version of torch", "", lambda one: one.result.meta_info.package_info.get("torch-version")),
        ("The number of steps", "", lambda one: one.result.run_info.train_config.max_steps),
        ("The batch size", "", lambda one: one.result.run_info.train_config.batch_size),
        ("The precision", "", lambda one: one.result.run_info.train_config.dtype or None),
    ]
    for name, so, fact in facts:
        told = _told(trained, fact)
        if told:
            notes.append(f"{name} differs{so}: {told}.")
    if any(one.old_forgetting for one in trained):
        notes.append(
            f"Forgetting of runs before {_FORGETTING_MENDED} is left out: PEFT measured it otherwise then "
            "(huggingface/peft#3419)."
        )
    notes.append("Learning rates are those of each experiment; PEFT's benchmark searches none.")
    return notes


def _told(trained: Sequence[_Trained], fact: Callable[[_Trained], Any]) -> str:
    """Which trainings have which value, the usual one first; nothing where all that have one have the same."""
    values: dict[str, dict[str, None]] = {}
    for one in trained:
        if (value := fact(one)) is not None:
            shown = f"{value:,.0f}" if isinstance(value, float) else printable(str(value))
            values.setdefault(shown, {})[one.title] = None
    if len(values) < 2:
        return ""
    (usual, most), *others = sorted(values.items(), key=lambda pair: -len(pair[1]))
    return ", ".join([f"{usual} for {len(most)} of them", *(f"{value} for {_few(titles)}" for value, titles in others)])


def _few(titles: Iterable[str]) -> str:
    listed = list(titles)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
