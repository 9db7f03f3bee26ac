"""Methods side by side: the same budget of learning rates for each, then its seeds at the best, and a table."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from isotune.experiments import methods, registry
from isotune.experiments.execute import check_extras
from isotune.experiments.rates import LEAST_FACTOR, MOST_RUNS, Given, Search, Widening, grid
from isotune.experiments.recipe import Recipe, RecipeError, validate
from isotune.experiments.schedule import Schedule, Variant
from isotune.experiments.text import YamlError, from_yaml, shown
from isotune.methods import checks
from isotune.versions import install


@dataclass(frozen=True)
class Options:
    """How methods are compared.

    Args:
        methods: as `parse` reads them; empty for those of the recipe.
        seeds: how many, the search's own included, at each method's best rate.
        lr_search: how many learning rates are tried for each method, `factor` apart around its usual one; or "auto", as
            many as it takes for the best to lie inside (`rates.Widening`).
        lr_runs: how many rates a search by "auto" may try for each method; None for `rates.MOST_RUNS`.
        rates: those to try for every method instead.
        match_params: how many parameters the adapters are to have, as near as each method's rank or block size allows.
        threads: of a run.
        keep_adapters: whether the trained weights stay, in `work/` of the comparison's folder.
        command: what repeats the comparison, for the record.

    Raises:
        RecipeError: a value is not allowed, alone or with another one.
    """

    methods: Sequence[str] = ()
    seeds: int = 3
    lr_search: int | Literal["auto"] = 3
    lr_runs: int | None = None
    rates: Sequence[float] = ()
    factor: float = 2.5
    match_params: int | None = None
    threads: int = 1
    keep_adapters: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for key, value in (
            ("--seeds", self.seeds),
            ("--lr-search", self.lr_search),
            ("--match-params", self.match_params),
        ):
            if isinstance(value, int) and value < 1:
                raise RecipeError(f"{key} is {value} and must be at least 1")
        if not 1 < self.factor < math.inf:
            raise RecipeError(f"--lr-factor is {self.factor:g} and must be above 1")
        auto = self.lr_search == "auto"
        if self.lr_runs is not None and (not auto or self.lr_runs < 3):
            raise RecipeError(f"--lr-runs is {self.lr_runs}; it is for --lr-search auto, which tries at least 3 rates")
        if not auto:
            return
        if self.rates:
            raise RecipeError("--lr-search auto finds the rates itself; leave it out, or --lr")
        if self.factor < LEAST_FACTOR:
            raise RecipeError(
                f"--lr-factor is {self.factor:g} and must be at least {LEAST_FACTOR:g} with --lr-search auto, "
                "whose rates have two digits"
            )
        if importlib.util.find_spec("optuna") is None:
            raise RecipeError(f"--lr-search auto needs optuna: {install('search')}")


def whole_number(text: str) -> int:
    """A number of parameters such as 80000, 80k or 1.2M."""
    try:
        return checks.whole_number("--match-params", text)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def searched(text: str) -> int | Literal["auto"]:
    """A number of learning rates, or "auto"."""
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise RecipeError(f"--lr-search is {shown(text)} and must be a number of learning rates, such as 3, or auto")
    return int(text)


def split_methods(text: str) -> list[str]:
    """The methods of a list separated by commas; a comma inside brackets belongs to an option's value."""
    return [part for part in re.split(r",(?![^\[\]]*\])", text) if part]


def rates(text: str) -> list[float]:
    """The learning rates of a list separated by commas."""
    return _numbers("--lr", text.split(","))


def parse(text: str, recipe: Recipe, options: Options) -> Variant:
    """A method as the command line gives it: `psoft`, or with options `psoft:r=64+psoft_mag_a=false`.

    Options are those of the method's configuration, values are YAML. `lr=X` moves the middle of its search to X,
    `lr=[X,Y]` says which rates to try, and `train.KEY=VALUE` gives it a training setting of its own, also one within a
    section, as train.moving.every is. What the recipe says of the same method, but for the learning rate, holds where
    nothing is given.

    Raises:
        RecipeError: no such method or option, or a value that is not allowed.
    """
    name, _, rest = text.partition(":")
    own = next((m for m in (recipe.method, *recipe.baselines) if m.name == name), None)
    shared = () if registry.is_plain(name) else registry.SHARED_OPTIONS
    given: dict[str, Any] = {key: value for key, value in recipe.method.options.items() if key in shared}
    train: dict[str, Any] = {"lr_head": None} if name == "head" else {}
    if own is not None:
        given |= own.options
        train |= own.train
    train.pop("lr", None)
    tried, centre = list(options.rates), 0.0
    for part in re.split(r"\+(?=[A-Za-z_.]+=)", rest) if rest else ():
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise RecipeError(f"method {text!r}: an option is KEY=VALUE, and several are joined by +, not {part!r}")
        try:
            read = from_yaml(value)
        except YamlError as error:
            raise RecipeError(f"method {text!r}: the value of {key} is not valid YAML: {shown(value)}") from error
        if key == "lr":
            numbers = _numbers(text, read)
            tried, centre = (numbers, centre) if isinstance(read, list) else ([], numbers[0])
        elif key.startswith("train."):
            own_key, _, inner = key.removeprefix("train.").partition(".")
            known = train.get(own_key)
            train[own_key] = {**(known if isinstance(known, dict) else {}), inner: read} if inner else read
        else:
            given[key] = read
    # Through the recipe's own check, which names the nearest method to a misspelt one.
    asked = validate({**recipe.model_dump(), "method": {"name": name, **given, "train": train}}, text).method
    method = methods.checked(asked)
    centre = centre or registry.entry(name).rate_with(method.options)
    return Variant(text, method, _search(tried, centre, options))


def _search(tried: Sequence[float], centre: float, options: Options) -> Search:
    if tried:
        return Given(tuple(sorted(set(tried))))
    if options.lr_search == "auto":
        return Widening(centre, options.factor, options.lr_runs or MOST_RUNS)
    return Given(grid(centre, options.lr_search, options.factor))


def _numbers(text: str, value: Any) -> list[float]:
    try:
        # YAML reads 1e-3 as text.
        numbers = [float(one) for one in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if not numbers or not all(0 < n < math.inf for n in numbers):
        raise RecipeError(f"{text}: a learning rate is a number above 0, such as 1e-3, not {shown(value)}")
    return numbers


def plan(name: str, recipe: Recipe, options: Options, folder: Path) -> Schedule:
    """The runs of a comparison, after all checks that need no model; nothing is written or trained.

    Args:
        name: the recipe's, for the records.
        folder: for the results.

    Raises:
        RecipeError: a method is wrong.
        DataError: the data cannot be used.
    """
    from isotune.experiments import tasks

    given = list(options.methods) or [method.name for method in recipe.methods]
    variants = [parse(text, recipe, options) for text in given]
    check_extras(recipe, [variant.method for variant in variants])
    trials = {variant.search.runs: variant.label for variant in variants}
    if len(trials) > 1:
        counts = " and ".join(f"{label} {count}" for count, label in sorted(trials.items()))
        raise RecipeError(f"every method is given the same number of learning rates, but {counts}")
    seeds = [recipe.train.seed + i for i in range(options.seeds)]
    found = Schedule(
        name, recipe, variants, seeds, folder, tasks.make(recipe), options.threads, keep_adapters=options.keep_adapters
    )
    if options.match_params is not None:
        found.variants, found.notes = _matched(variants, found.task, options.match_params)
    found.details = {key: getattr(options, key) for key in ("lr_search", "lr_runs", "match_params", "command")}
    return found


def _matched(variants: Sequence[Variant], task: Any, target: int) -> tuple[list[Variant], list[str]]:
    from isotune.experiments import budget

    model, head = task.build()
    count = budget.counter(model, head, task.peft_type)
    found = [replace(variant, method=budget.match(variant.method, target, count)) for variant in variants]
    notes = []
    for variant, before in zip(found, variants, strict=True):
        name = variant.method.name
        size = registry.entry(name).size_option
        if registry.is_plain(name):
            notes.append(f"{variant.label}: no adapter to match")
            continue
        how = f"{size}={variant.method.options[size]}" if size in variant.method.options else "no size to choose"
        given = ", as given" if size in before.method.options else ""
        notes.append(f"{variant.label}: {count(variant.method):,} adapter parameters, {how}{given}")
    return found, notes
