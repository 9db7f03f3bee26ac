"""Reading a comparison's folder: its runs, and a method's figures computed from them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from isotune.experiments import angles, paper
from isotune.experiments.files import read_json
from isotune.experiments.recipe import LESS_IS_BETTER

NAMES = {
    "psoft": "PSOFT",
    "psoft_so": "PSOFT-SO",
    "lora_xs": "LoRA-XS",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "vera": "VeRA",
    "qgoft": "qGOFT",
    "head": "head only",
    "full": "full fine-tuning",
}
"""How methods are written; others in capitals."""

SIZES = {"r": "r", "oft_block_size": "b", "boft_block_size": "b", "boft_n_butterfly_factor": "m"}
"""Options that say how large a method is, and the letter that papers have for each."""

_SHARED = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Run:
    """One training run, as its record says. None stands for what the record does not hold."""

    path: Path
    label: str
    method: Mapping[str, Any]
    """Its name, and the options that were given."""
    phase: str
    lr: float | None
    seed: int
    failed: str | None
    """Why it came to nothing, in a line."""
    score: float | None
    """On the test data, in the comparison's metric."""
    validation: Mapping[str, float]
    """On the validation data, by metric."""
    parts: Mapping[str, float]
    """The score on each of several test sets, by name."""
    interval: tuple[float, float] | None
    """Of the score."""
    interval_how: str
    curve: Sequence[Mapping[str, Any]]
    trainable_parameters: float | None
    adapter_parameters: float | None
    head_parameters: float | None
    adapter_bytes: float | None
    train_seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    kept_bytes: float | None
    forgetting: float | None
    """How much worse the model became at other text."""
    forgetting_measure: str
    forgetting_text: str
    geometry: Mapping[str, Any] | None
    versions: Mapping[str, Any]
    hardware: Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A method with its options in a comparison: the runs of its search, and its seeds at the rate that was chosen."""

    label: str
    title: str
    """For people, such as PSOFT r=46."""
    method: Mapping[str, Any]
    lr: float | None
    runs: Sequence[Run]
    """At the chosen rate, one a seed, none that failed."""
    search: Sequence[Run]
    """Of every rate tried, none that failed, by rate."""
    failed: str | None
    rate_at_border: bool = False

    @property
    def name(self) -> str:
        """The method's name in a recipe."""
        return str(self.method.get("name", self.label.partition(":")[0]))

    @cached_property
    def scores(self) -> list[float]:
        """Of every seed."""
        return [run.score for run in self.runs if run.score is not None]

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean over the seeds; None for a single seed."""
        return statistics.stdev(self.scores) / math.sqrt(len(self.scores)) if len(self.scores) > 1 else None

    def average(self, field_name: str) -> float | None:
        """The mean of a field over the seeds that have it."""
        values = [value for run in self.runs if (value := getattr(run, field_name)) is not None]
        return statistics.fmean(values) if values else None

    @property
    def geometry(self) -> Mapping[str, Any] | None:
        """What the first run that has one measured."""
        return next((run.geometry for run in self.runs if run.geometry), None)


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
    variants: Sequence[Variant]
    runs: Sequence[Run]
    """All of them, also those that failed."""
    chosen_by: str
    """The validation metric that learning rates were compared by."""
    notes: Sequence[str] = ()
    """What is missing, a sentence each."""

    @property
    def percent(self) -> bool:
        """Whether the metric is a share."""
        return "accuracy" in self.metric

    @property
    def scored(self) -> list[Variant]:
        """The methods that have a result."""
        return [variant for variant in self.variants if variant.mean is not None]

    @cached_property
    def best(self) -> Variant | None:
        """The method with the best mean."""
        found = self.scored
        if not found:
            return None
        return (max if self.higher_is_better else min)(found, key=lambda variant: variant.mean or 0.0)

    def near_best(self, variant: Variant) -> bool:
        """Whether a method other than the best is within one standard error, the best's own, of the best."""
        best = self.best
        if best is None or variant is best or best.mean is None or best.standard_error is None or variant.mean is None:
            return False
        return abs(best.mean - variant.mean) <= best.standard_error

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

    def shown(self, score: float | None, *, sign: bool = False) -> str:
        """A score as people read it."""
        if score is None:
            return "–"
        plus = "+" if sign else ""
        return f"{100 * score:{plus}.1f} %" if self.percent else f"{score:{plus}.3f}"

    def shown_error(self, error: float | None) -> str:
        """A standard error to stand behind a score, empty for none."""
        if error is None:
            return ""
        return f"± {100 * error:.1f}" if self.percent else f"± {error:.3f}"


def read(folder: Path) -> Comparison:
    """Read the folder of a comparison, finished or not.

    Args:
        folder: what `isotune compare` wrote: `comparison.json`, and a record for each run under `runs/`. Fields that
            are not there are left out of the report, and a comparison that was stopped before `comparison.json` was
            written is put together from its runs.

    Raises:
        ValueError: there is neither, or a file is damaged; names it.
    """
    path = folder / "comparison.json"
    head = _File.read(path) if path.exists() else _File(path, {})
    records = [_File.read(record) for record in sorted((folder / "runs").rglob("*.json"))]
    if not path.exists() and not records:
        raise ValueError(f"{folder} holds no comparison; give a folder that `isotune compare` wrote (comparison.json)")
    first = next((record for record in records if "metric" in record.content), _File(path, {}))
    metric = head.text("metric") or first.text("metric") or "accuracy"
    data = head.mapping("data") or first.mapping("data")
    runs = [_run(record, metric, data.get("sets") or ()) for record in records]
    # A task whose answers are generated may choose by the loss, as generating takes long.
    chosen_by = metric if any(metric in run.validation for run in runs) else "loss"
    higher = bool(head.content.get("higher_is_better", True))
    rows = {str(row.get("label")): row for row in head.list("rows") if isinstance(row, dict)}
    labels = [str(label) for label in head.list("variants")] or list(rows)
    labels += [label for label in dict.fromkeys(run.label for run in runs) if label not in labels]
    variants = _with_titles(
        [_variant(label, [r for r in runs if r.label == label], rows.get(label, {}), chosen_by) for label in labels]
    )
    seeds = [int(seed) for seed in head.list("seeds")] or sorted({run.seed for run in runs})
    return Comparison(
        folder=folder,
        recipe=head.text("recipe") or first.text("recipe") or folder.name,
        task=head.text("task") or first.text("task"),
        model=head.text("model") or first.text("model"),
        metric=metric,
        higher_is_better=higher,
        seeds=seeds,
        command=head.text("command"),
        data=data,
        match_params=head.number("match_params"),
        variants=variants,
        runs=runs,
        chosen_by=chosen_by,
        notes=_notes(head, variants, seeds, path.exists()),
    )


def _variant(label: str, runs: Sequence[Run], row: Mapping[str, Any], chosen_by: str) -> Variant:
    done = [run for run in runs if run.failed is None and run.score is not None]
    search = sorted((run for run in done if run.phase == "search"), key=lambda run: run.lr or 0.0)
    lr = row.get("lr")
    if lr is None:
        tested = [run for run in search if chosen_by in run.validation] or search[:1]
        sign = -1 if chosen_by in LESS_IS_BETTER else 1
        lr = max(tested, key=lambda run: sign * run.validation.get(chosen_by, 0.0)).lr if tested else None
    chosen = {run.seed: run for run in done if lr is None or run.lr == lr}
    failures = [run.failed for run in runs if run.failed is not None and (not chosen or run.lr == lr)]
    tried = sorted({run.lr for run in runs if run.phase == "search" and run.lr is not None})
    method = next((run.method for run in runs if run.method), row.get("method") or {"name": label.partition(":")[0]})
    return Variant(
        label=label,
        title=_title(label, method),
        method=method,
        lr=lr,
        runs=[chosen[seed] for seed in sorted(chosen)],
        search=search,
        failed=row.get("failed") or next(iter(failures), None),
        rate_at_border=len(tried) > 1 and lr in (tried[0], tried[-1]),
    )


def _title(label: str, method: Mapping[str, Any]) -> str:
    name = str(method.get("name", label.partition(":")[0]))
    parts = [NAMES.get(name, name.upper())]
    for key, value in method.items():
        if key == "name" or key in _SHARED:
            continue
        if key in ("psoft_mag_a", "psoft_mag_b"):
            vector = "α" if key == "psoft_mag_a" else "β"
            parts.append(vector if value else f"no {vector}")
        elif key == "psoft_orth":
            parts.append("strict" if value else "free R")
        else:
            parts.append(f"{SIZES.get(key, key)}={value}")
    return " ".join(parts)


def _with_titles(variants: Sequence[Variant]) -> list[Variant]:
    """Two variants that differ in what no title says, a training setting, are told apart by their labels."""
    titles = [variant.title for variant in variants]
    return [
        dataclasses.replace(variant, title=variant.label.replace(":", " ").replace("+", " "))
        if titles.count(variant.title) > 1
        else variant
        for variant in variants
    ]


def _notes(head: _File, variants: Sequence[Variant], seeds: Sequence[int], whole: bool) -> list[str]:
    notes = []
    if not whole:
        notes.append("comparison.json is not there: what is shown is put together from the runs that are.")
    elif head.content.get("complete") is False:
        notes.append("The comparison is not finished; the command below goes on with it.")
    notes += [f"{variant.title} failed: {variant.failed}" for variant in variants if variant.failed is not None]
    untouched = [v.title for v in variants if v.failed is None and not v.runs]
    if untouched:
        notes.append(f"Not run yet: {', '.join(untouched)}.")
    short = [f"{v.title} {len(v.runs)}" for v in variants if v.failed is None and 0 < len(v.runs) < len(seeds)]
    if short:
        notes.append(f"Of {len(seeds)} seeds there are fewer: {', '.join(short)}.")
    return notes


def _run(record: _File, metric: str, sets: Iterable[str]) -> Run:
    interval = record.mapping("interval")
    low, high = _finite(interval.get("low")), _finite(interval.get("high"))
    forgetting, test = record.mapping("forgetting"), record.mapping("test")
    return Run(
        path=record.path,
        label=record.text("label") or record.path.parent.name,
        method=record.mapping("method"),
        phase=record.text("phase") or "seed",
        lr=record.number("lr"),
        seed=int(record.number("seed") or 0),
        failed=record.text("failed") or None,
        score=_finite(test.get(metric)),
        validation=_numbers(record.mapping("validation")),
        parts={name: value for name, value in _numbers(test).items() if name in sets},
        interval=None if low is None or high is None else (low, high),
        interval_how=_how(interval),
        curve=[point for point in record.list("curve") if isinstance(point, dict)],
        forgetting=_finite(forgetting.get("change")),
        forgetting_measure=str(forgetting.get("measure") or "the loss on other text"),
        forgetting_text=str(forgetting.get("text") or ""),
        geometry=_geometry(record.mapping("geometry")),
        versions=record.mapping("versions"),
        hardware=record.mapping("hardware"),
        **{
            key: record.number(key)
            for key in (
                "trainable_parameters",
                "adapter_parameters",
                "head_parameters",
                "adapter_bytes",
                "train_seconds",
                "tokens_per_second",
                "peak_memory_bytes",
                "kept_bytes",
            )
        },
    )


def _geometry(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `adapter_geometry` measured; None for a form of it that is not known here."""
    return content if content.get("format") == angles.FORMAT and content.get("layers") else None


def _how(interval: Mapping[str, Any]) -> str:
    level = interval.get("level")
    parts = [f"{level:.0%}" if isinstance(level, float) else "", str(interval.get("how") or "")]
    return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class _File:
    """A JSON object with its name for errors."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _File:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"cannot read {path}: it holds {_kind(content)}, and should hold an object")
        return cls(path, content)

    def _get(self, key: str, kind: type | tuple[type, ...], called: str) -> Any:
        value = self.content.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"cannot read {self.path}: {key} should be {called}, not {_kind(value)}")
        return value

    def text(self, key: str) -> str:
        return str(self._get(key, str, "text") or "")

    def number(self, key: str) -> float | None:
        return _finite(self._get(key, (int, float), "a number"))

    def mapping(self, key: str) -> dict[str, Any]:
        return dict(self._get(key, dict, "an object") or {})

    def list(self, key: str) -> list[Any]:
        return list(self._get(key, list, "a list") or ())


def _kind(value: Any) -> str:
    return json.dumps(value)[:40]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: number for key, value in values.items() if (number := _finite(value)) is not None}


def _finite(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


# -- what the table and the page both show of a method --------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A figure of each method."""

    key: str
    """Its name where a program reads it."""
    title: str
    value: Callable[[Variant], float | None]
    show: Callable[[float], str]
    detail: bool = False
    """Whether it is told beside another figure rather than in a column of its own, where people read it."""


def count(value: float) -> str:
    """A number of things, with separators."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes, in the unit that leaves up to four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def duration(value: float) -> str:
    """Seconds, or minutes and hours where that is shorter."""
    if value < 100:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    for unit, length in (("min", 60.0), ("h", 3600.0)):
        if value < 100 * length or unit == "h":
            return f"{value / length:.{1 if value < 10 * length else 0}f} {unit}"
    raise AssertionError("unreachable")


def _average(name: str) -> Callable[[Variant], float | None]:
    return lambda variant: variant.average(name)


def _part(name: str) -> Callable[[Variant], float | None]:
    def value(variant: Variant) -> float | None:
        values = [run.parts[name] for run in variant.runs if name in run.parts]
        return statistics.fmean(values) if values else None

    return value


COLUMNS = (
    Column("trainable_parameters", "Trained numbers", _average("trainable_parameters"), count),
    Column("adapter_parameters", "Numbers in the adapter", _average("adapter_parameters"), count, detail=True),
    Column("adapter_bytes", "File", _average("adapter_bytes"), size),
    Column("train_seconds", "Training time", _average("train_seconds"), duration),
    Column("tokens_per_second", "Tokens a second", _average("tokens_per_second"), count),
    Column("peak_memory_bytes", "Peak memory", _average("peak_memory_bytes"), size),
    Column("kept_bytes", "Kept for backward", _average("kept_bytes"), size),
    Column("forgetting", "Forgetting", _average("forgetting"), lambda value: f"{round(value, 3) + 0.0:+.3f}"),
)
"""After the score; a comparison shows those of which any method has a value."""


def columns_of(comparison: Comparison, *, details: bool = False) -> list[Column]:
    """The columns of which any method of a comparison has a value."""
    parts = [Column(f"test_{name}", name.replace("_", " "), _part(name), comparison.shown) for name in comparison.parts]
    found = [c for c in (*parts, *COLUMNS) if any(c.value(variant) is not None for variant in comparison.variants)]
    return [column for column in found if details or not column.detail]


def pareto(points: Iterable[tuple[float, float, Any]], *, higher_is_better: bool) -> list[tuple[float, float, Any]]:
    """The points (cost, score, …) that no other beats in both, by cost; of equal ones the first."""
    sign = 1.0 if higher_is_better else -1.0
    front: list[tuple[float, float, Any]] = []
    for point in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * point[1] > sign * front[-1][1]:
            front.append(point)
    return front
