"""Methods side by side: the same budget of learning rates for each, then its seeds at the best, and a table."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from isotune.experiments import methods, summary
from isotune.experiments.engines import Engine
from isotune.experiments.files import read_json, write_json
from isotune.experiments.recipe import LESS_IS_BETTER, Method, Recipe, RecipeError, Train, validate
from isotune.experiments.single import FORMAT, Spec

DEFAULT_FACTOR = 2.5
# What says which layers are adapted holds for every method of a comparison, whichever method a recipe names.
_SHARED_OPTIONS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# The mean over a method's seeds is what its row says of these; of `forgetting` the change.
_AVERAGED = (
    "validation_score",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "kept_bytes",
    "adapter_bytes",
    "forgetting",
)


@dataclass(frozen=True)
class Variant:
    """A method with its options, under a label of its own, and the learning rates that are tried for it."""

    label: str
    method: Method
    rates: tuple[float, ...]

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9=.,\[\]-]+", "_", self.label)


@dataclass(frozen=True)
class Options:
    """How methods are compared.

    Args:
        methods: the methods as `parse` reads them; empty for those of the recipe.
        seeds: how many seeds each method is trained with at its best rate, the search's own included.
        lr_search: how many learning rates are tried for each method, `factor` apart around its usual one.
        rates: the rates to try for every method instead.
        factor: from one rate of a search to the next.
        match_params: how many parameters the adapters are to have, as near as each method's rank or block size allows.
        threads: of a run.
        keep_adapters: whether the trained weights stay, in `work/` of the comparison's folder.
        command: what repeats the comparison, for the record.
    """

    methods: Sequence[str] = ()
    seeds: int = 3
    lr_search: int = 3
    rates: Sequence[float] = ()
    factor: float = DEFAULT_FACTOR
    match_params: int | None = None
    threads: int = 1
    keep_adapters: bool = False
    command: str = ""


def whole_number(text: str) -> int:
    """A number of parameters such as 80000, 80k or 1.2M; raises RecipeError."""
    units = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
    unit = units.get(text[-1:].lower(), 1)
    try:
        return round(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"a number of parameters is such as 80000, 80k or 1.2M, not {text!r}") from error


def split_methods(text: str) -> list[str]:
    """The methods of a list separated by commas; a comma inside brackets belongs to an option's value."""
    return [part for part in re.split(r",(?![^\[\]]*\])", text) if part]


def rates(text: str) -> list[float]:
    """The learning rates of a list separated by commas; raises RecipeError."""
    found = _numbers("--lr", text.split(","))
    assert isinstance(found, list)
    return found


def parse(text: str, recipe: Recipe, options: Options) -> Variant:
    """A method as the command line gives it: `psoft`, or with options `psoft:r=64+psoft_mag_a=false`.

    Options are those of the method's configuration, values are YAML. `lr=X` moves the middle of its search to X,
    `lr=[X,Y]` says which rates to try, and `train.KEY=VALUE` gives it a training setting of its own. What the recipe
    says of the same method, but for the learning rate, holds where nothing is given. Raises RecipeError.
    """
    name, _, rest = text.partition(":")
    own = next((m for m in (recipe.method, *recipe.baselines) if m.name == name), None)
    given: dict[str, Any] = {
        key: value
        for key, value in recipe.method.options.items()
        if key in _SHARED_OPTIONS and name not in methods.PLAIN
    }
    train: dict[str, Any] = {"lr_head": None} if name == "head" else {}
    if own is not None:
        given |= own.options
        train |= own.train
    train.pop("lr", None)
    centre: Any = None
    for part in re.split(r"\+(?=[A-Za-z_.]+=)", rest) if rest else ():
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise RecipeError(f"method {text!r}: an option is KEY=VALUE, and several are joined by +, not {part!r}")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"method {text!r}: the value of {key} is not valid YAML: {value!r}") from error
        if key == "lr":
            centre = _numbers(text, read)
        elif key.startswith("train."):
            train[key.removeprefix("train.")] = read
        else:
            given[key] = read
    # Through the recipe's own check, which names the nearest method to a misspelt one.
    method = validate({**recipe.model_dump(), "method": {"name": name, **given, "train": train}}, text).method
    methods.check(method)
    return Variant(text, method, _rates(name, centre, options))


def _numbers(text: str, value: Any) -> list[float] | float:
    values = value if isinstance(value, list) else [value]
    try:
        # YAML reads 1e-3 as text.
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(0 < n < math.inf for n in numbers):
        raise RecipeError(f"{text}: a learning rate is a number above 0, such as 1e-3, not {value!r}")
    return numbers if isinstance(value, list) else numbers[0]


def _rates(name: str, centre: list[float] | float | None, options: Options) -> tuple[float, ...]:
    if isinstance(centre, list):
        return tuple(sorted(set(centre)))
    if centre is None and options.rates:
        return tuple(sorted(set(options.rates)))
    return grid(methods.LEARNING_RATES[name] if centre is None else centre, options.lr_search, options.factor)


def grid(centre: float, count: int, factor: float) -> tuple[float, ...]:
    """`count` learning rates `factor` apart, with `centre` in the middle; rounded to two digits."""
    return tuple(float(f"{centre * factor ** (i - (count - 1) / 2):.2g}") for i in range(count))


@dataclass
class Plan:
    """What a comparison consists of, and what of it has been done.

    Args:
        name: the recipe's, for the records.
        recipe: what is learnt, by which model.
        variants: what is compared.
        options: how.
        folder: the comparison's.
        about: what a record says of the data.
        notes: what the user should know before it starts.
    """

    name: str
    recipe: Recipe
    variants: list[Variant]
    options: Options
    folder: Path
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    records: dict[tuple[str, float, int], dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds, the first of which is the search's."""
        return [self.recipe.train.seed + i for i in range(self.options.seeds)]

    @cached_property
    def heads(self) -> dict[int, Spec]:
        """The heads that runs start from where the recipe asks for that, by seed."""
        if not self.recipe.train.start_from_head:
            return {}
        method = next(m for m in self.recipe.baselines if m.name == "head")
        lr = self.recipe.training(method).lr[0]
        return {seed: self._spec("start", Variant("start:head", method, (lr,)), lr, seed) for seed in self.seeds}

    def search(self, variant: Variant) -> list[Spec]:
        """The runs that find a method's learning rate."""
        return [self._spec("search", variant, lr, self.seeds[0]) for lr in variant.rates]

    def best(self, variant: Variant) -> float | None:
        """The rate with the highest score on validation; None while runs are missing, or where all have failed."""
        scores: dict[float, float] = {}
        for spec in self.search(variant):
            record = self.records.get(spec.key)
            if record is None:
                return None
            if "failed" not in record:
                scores[spec.lr] = self.recipe.merit(record["validation"])
        return max(scores, key=lambda lr: scores[lr]) if scores else None

    def total(self) -> int:
        """How many runs the whole comparison has, failed searches not foreseen."""
        return len(self.heads) + sum(len(v.rates) + self.options.seeds - 1 for v in self.variants)

    def ready(self) -> Iterator[Spec]:
        """The runs that can be started and have not been done: heads, searches, then seed after seed."""
        for spec in self._possible():
            if spec.key not in self.records:
                head = self.heads.get(spec.seed) if spec.start_from else None
                if head is None or "failed" not in self.records.get(head.key, {"failed": "not done"}):
                    yield spec

    def _possible(self) -> Iterator[Spec]:
        yield from self.heads.values()
        for variant in self.variants:
            yield from self.search(variant)
        best = {variant.label: self.best(variant) for variant in self.variants}
        for seed in self.seeds[1:]:
            for variant in self.variants:
                lr = best[variant.label]
                if lr is not None:
                    yield self._spec("seed", variant, lr, seed)

    def _spec(self, phase: str, variant: Variant, lr: float, seed: int) -> Spec:
        method = variant.method.model_copy(update={"train": {**variant.method.train, "lr": [lr], "seed": seed}})
        recipe = self.recipe.model_copy(update={"method": method})
        run = f"lr={lr:g}-seed={seed}"
        head = self.heads.get(seed) if phase != "start" and variant.method.name != "head" else None
        records = self.folder / "heads" if phase == "start" else self.folder / "runs" / variant.folder
        work = self.folder / ("heads" if phase == "start" else f"work/{variant.folder}")
        return Spec(
            name=self.name,
            label=variant.label,
            phase=phase,
            lr=lr,
            seed=seed,
            recipe=recipe.model_dump(mode="json"),
            fingerprint=self.about["fingerprint"],
            folder=str((work / run).resolve()),
            record=str((records / f"{run}.json").resolve()),
            start_from=head.folder if head else None,
            threads=self.options.threads,
        )

    def load(self) -> None:
        """Read the records of what has been done; raises RecipeError where they are of other settings.

        What failed for a reason that may have passed, such as a lack of memory, is not counted as done.
        """
        # A search may have to be read before the best rate is known, and with it which further runs there are.
        while True:
            found = [spec for spec in self._possible() if spec.key not in self.records and self._read(spec)]
            if not found:
                return

    def _read(self, spec: Spec) -> bool:
        path = Path(spec.record)
        if not path.exists():
            return False
        record = read_json(path)
        # A later release may know more settings; what an earlier one has stored then had their defaults.
        record["settings"] = Train.model_validate(record["settings"]).model_dump(mode="json")
        for key, value in spec.identity().items():
            if key != "phase" and record.get(key) != value:
                raise RecipeError(
                    f"{path} is of a run with other settings ({key} is {record.get(key)!r} there and {value!r} here); "
                    "give another folder with -o, or remove that one"
                )
        if "failed" in record and not record["final"]:
            return False
        self.records[spec.key] = record
        return True

    def settle(self, spec: Spec, record: dict[str, Any]) -> None:
        """Note that a run has ended, and remove what it needed only to go on."""
        self.records[spec.key] = record
        path = Path(spec.record)
        if not path.exists() or read_json(path) != record:
            write_json(path, record)
        if "failed" not in record and spec.phase != "start" and not self.options.keep_adapters:
            shutil.rmtree(spec.folder, ignore_errors=True)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each method, in the order in which they were given."""
        return [self._row(variant) for variant in self.variants]

    def _row(self, variant: Variant) -> dict[str, Any]:
        searched = [self.records[s.key] for s in self.search(variant) if s.key in self.records]
        lr = self.best(variant)
        row: dict[str, Any] = {
            "label": variant.label,
            "method": {"name": variant.method.name, **variant.method.options},
            "lr": lr,
            "lr_tried": list(variant.rates),
            # The best rate lies at the border of what was tried, so that a better one may lie beyond.
            "lr_at_border": lr is not None
            and len(variant.rates) > 2
            and lr in (min(variant.rates), max(variant.rates)),
            "mean": None,
            "standard_error": None,
            "seeds": 0,
            "scores": {},
            "failed": None,
        }
        done: list[dict[str, Any]] = []
        failed = [record["failed"] for record in searched if "failed" in record]
        if lr is not None:
            at_best = [self.records[k] for s in self.seeds if (k := (variant.label, lr, s)) in self.records]
            done = [record for record in at_best if "failed" not in record]
            failed = [record["failed"] for record in at_best if "failed" in record]
        elif len(searched) == len(variant.rates) and failed:
            row["failed"] = f"at every learning rate; at the first: {failed[0]}"
        heads = [self.records[head.key] for head in self.heads.values() if head.key in self.records]
        broken = [head["failed"] for head in heads if "failed" in head]
        if broken and variant.method.name != "head":
            row["failed"] = f"the head to start from: {broken[0]}"
        if lr is not None and failed:
            row["failed"] = f"{len(failed)} of {self.options.seeds} seeds: {failed[0]}"
        if done:
            scores = [_flat(record)["score"] for record in done]
            row |= {
                "mean": statistics.fmean(scores),
                "standard_error": statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
                "seeds": len(scores),
                "scores": {str(record["seed"]): score for record, score in zip(done, scores, strict=True)},
                **{key: done[0][key] for key in ("trainable_parameters", "adapter_parameters", "head_parameters")},
            }
            for key in _AVERAGED:
                values = [value for record in done if (value := _flat(record).get(key)) is not None]
                row[key] = statistics.fmean(values) if values else None
        return row

    def result(self) -> dict[str, Any]:
        """The comparison as JSON, as far as it has come."""
        return {
            "format": FORMAT,
            "recipe": self.name,
            "task": self.recipe.task,
            "model": self.recipe.model,
            "metric": self.recipe.metric,
            "higher_is_better": self.recipe.metric not in LESS_IS_BETTER,
            "variants": [variant.label for variant in self.variants],
            "lr_search": self.options.lr_search,
            "seeds": self.seeds,
            "match_params": self.options.match_params,
            "command": self.options.command,
            "data": self.about,
            "complete": not any(True for _ in self.ready()),
            "rows": self.rows(),
        }


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    metric = record["metric"]
    return {
        **record,
        "score": record["test"][metric],
        "validation_score": (record["validation"] or {}).get(metric),
        "forgetting": (record["forgetting"] or {}).get("change"),
    }


def plan(name: str, recipe: Recipe, options: Options, folder: Path) -> Plan:
    """Check everything that can be checked before the first run, and read what has been done.

    Raises RecipeError and DataError, ValueErrors with one line for the user.
    """
    from isotune.experiments import run, tasks

    for key, value in {"--seeds": options.seeds, "--lr-search": options.lr_search}.items():
        if value < 1:
            raise RecipeError(f"{key} is {value} and must be at least 1")
    if not 1 < options.factor < math.inf:
        raise RecipeError(f"--lr-factor is {options.factor:g} and must be above 1")
    run.check_extras()
    given = list(options.methods) or [method.name for method in recipe.methods]
    variants = [parse(text, recipe, options) for text in given]
    folders = [variant.folder for variant in variants]
    for variant in variants:
        if folders.count(variant.folder) > 1:
            raise RecipeError(f"the method {variant.label} is given twice")
    trials = {len(variant.rates): variant.label for variant in variants}
    if len(trials) > 1:
        told = " and ".join(f"{label} {count}" for count, label in sorted(trials.items()))
        raise RecipeError(f"every method is given the same number of learning rates, but {told}")
    if options.match_params is not None and options.match_params < 1:
        raise RecipeError(f"--match-params is {options.match_params} and must be at least 1")
    task = tasks.make(recipe)
    if not task.sizes["validation"] and max(trials) > 1:
        raise RecipeError(
            "learning rates are chosen on a validation set, and there is none: give one, or --lr-search 1"
        )
    about = {**task.sizes, **task.about(), "fingerprint": task.fingerprint()}
    _claim(folder, {"recipe": _identity(recipe), "data": about["fingerprint"]})
    notes: list[str] = []
    if options.match_params is not None:
        variants, notes = _matched(variants, task, options.match_params)
    found = Plan(name, recipe, variants, options, folder, about, notes)
    found.load()
    return found


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe makes two comparisons two: all but its methods."""
    from isotune.experiments.run import NOT_IDENTITY

    return recipe.model_dump(mode="json", exclude={*NOT_IDENTITY, "method", "baselines"})


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    from isotune.experiments.run import claim

    stored = folder / "experiment.json"
    if stored.exists():
        other = read_json(stored)
        # As an earlier release may have stored it, which knew fewer settings.
        recipe = Recipe.model_validate({**other["recipe"], "method": "head", "baselines": ["head"]})
        if {**other, "recipe": _identity(recipe)} == identity:
            return
    claim(folder, identity, "-o FOLDER")


def _matched(variants: Sequence[Variant], task: Any, target: int) -> tuple[list[Variant], list[str]]:
    from isotune.experiments import budget

    model, head = task.build()
    count = budget.counter(model, head, task.peft_type)
    found = [replace(variant, method=budget.match(variant.method, target, count)) for variant in variants]
    notes = []
    for variant, before in zip(found, variants, strict=True):
        name = variant.method.name
        size = budget.SIZES.get(name)
        if name in methods.PLAIN:
            notes.append(f"{variant.label}: no adapter to match")
            continue
        how = f"{size}={variant.method.options[size]}" if size in variant.method.options else "no size to choose"
        given = ", as given" if size in before.method.options else ""
        notes.append(f"{variant.label}: {count(variant.method):,} adapter parameters, {how}{given}")
    return found, notes


def compare(found: Plan, engine: Engine) -> dict[str, Any]:
    """Carry out what is left of a comparison; `comparison.json` in its folder is renewed with every run that ends.

    At Ctrl-C the running ones save a checkpoint and KeyboardInterrupt is raised. A run that fails is noted in its
    record, and the others go on.
    """
    path = found.folder / "comparison.json"
    running: set[tuple[str, float, int]] = set()
    total = found.total()
    bar = tqdm(
        total=total,
        initial=min(total, len(found.records)),
        desc="comparing",
        unit="run",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
    )
    try:
        while True:
            for spec in found.ready():
                if engine.free and spec.key not in running:
                    running.add(spec.key)
                    engine.start(spec)
            if not engine.running:
                break
            for spec, record in engine.wait():
                running.discard(spec.key)
                found.settle(spec, record)
                tqdm.write(_line(spec, record), file=sys.stderr)
                bar.update()
                write_json(path, found.result())
    except KeyboardInterrupt:
        tqdm.write("interrupted: the runs save a checkpoint (Ctrl-C again to stop at once)", file=sys.stderr)
        engine.stop()
        raise
    finally:
        engine.close()
        bar.close()
    result = found.result()
    write_json(path, result)
    if not found.options.keep_adapters and not any("failed" in record for record in found.records.values()):
        shutil.rmtree(found.folder / "work", ignore_errors=True)
    return result


def _line(spec: Spec, record: Mapping[str, Any]) -> str:
    if "failed" in record:
        return f"{spec.title}: failed, {record['failed']}"
    flat = _flat(record)
    chosen = "" if flat["validation_score"] is None else f"validation {flat['validation_score']:.4f}, "
    return f"{spec.title}: {chosen}test {flat['score']:.4f}, {record['train_seconds']:.0f} s"


def table(result: Mapping[str, Any]) -> str:
    """The comparison as lines of text, one a method."""
    percent = result["metric"] == "accuracy"
    scale = 100 if percent else 1

    def score(row: Mapping[str, Any]) -> str:
        if row["mean"] is None:
            return "failed" if row["failed"] else "not done"
        error = (
            f" ± {scale * row['standard_error']:.{1 if percent else 3}f}" if row["standard_error"] is not None else ""
        )
        return f"{scale * row['mean']:.{1 if percent else 3}f}{error}" + (" %" if percent else "")

    def number(row: Mapping[str, Any], key: str, form: str, unit: float = 1) -> str:
        value = row.get(key)
        return "" if value is None else form.format(value / unit)

    lines = [
        ("", result["metric"].replace("_", " "), "seeds", "lr", "adapter", "trained", "file", "time", "peak", "kept"),
        *(
            (
                row["label"],
                score(row),
                str(row["seeds"]),
                number(row, "lr", "{:g}") + ("*" if row["lr_at_border"] else ""),
                number(row, "adapter_parameters", "{:,.0f}"),
                number(row, "trainable_parameters", "{:,.0f}"),
                number(row, "adapter_bytes", "{:,.0f} KiB", 1024),
                number(row, "train_seconds", "{:,.0f} s"),
                number(row, "peak_memory_bytes", "{:,.0f} MiB", 2**20),
                number(row, "kept_bytes", "{:,.1f} MiB", 2**20),
            )
            for row in result["rows"]
        ),
    ]
    text = summary.aligned(lines)
    if any(row["lr_at_border"] for row in result["rows"]):
        text += "\n* the best of the rates tried is the lowest or the highest; a better one may lie beyond"
    for row in result["rows"]:
        if row["failed"]:
            text += f"\n{row['label']} failed: {row['failed']}"
    return text


def command_line(arguments: Sequence[str]) -> str:
    """The command that repeats a comparison."""
    return shlex.join(["isotune", *arguments])
