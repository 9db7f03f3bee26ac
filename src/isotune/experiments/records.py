"""What a run leaves: its record, and what is read from one that may be old, damaged or made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from isotune.experiments import angles
from isotune.experiments.files import read_object
from isotune.experiments.resampling import Answers
from isotune.experiments.text import clean, shown

FORMAT = 1
"""Version of a run's record and of RESULT."""

RESULT = "comparison.json"
"""What `isotune train` and `isotune compare` write about all their runs, as `Schedule.result` makes it."""

LARGEST = 1e100
"""Numbers beyond it are no measurement."""


def number(value: Any) -> float | None:
    """A finite number of JSON as a float; None for NaN, an infinity and whatever is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        return None
    return float(value)


def _or(empty: Callable[[], Any]) -> BeforeValidator:
    """Nothing stands for the empty value."""
    return BeforeValidator(lambda value: empty() if value is None else value)


def _numbers(value: Any) -> Any:
    if not isinstance(value, dict):
        return {} if value is None else value
    return {key: found for key, one in value.items() if (found := number(one)) is not None}


_FINITE = BeforeValidator(lambda value: None if isinstance(value, float) and not math.isfinite(value) else value)
Size = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Number = Annotated[Size | None, _FINITE]
Rate = Annotated[Annotated[float, Field(strict=True, gt=0, le=LARGEST)] | None, _FINITE]
Whole = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Text = Annotated[str, _or(str)]
Object = Annotated[dict[str, Any], _or(dict)]
Items = Annotated[list[Any], _or(list)]
Scores = Annotated[dict[str, float], BeforeValidator(_numbers)]
Points = Annotated[list[Scores], _or(list)]
_WANTED = {
    **dict.fromkeys(("float_type", "finite_number", "greater_than_equal", "less_than_equal"), "a number"),
    **dict.fromkeys(("int_type", "less_than"), "a number without a fraction"),
    **dict.fromkeys(("model_type", "dict_type"), "an object"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "greater_than": "a number above 0",
    "list_type": "a list",
    "string_type": "text",
    "missing": "there",
}
"""What should have been where pydantic finds a fault of this kind."""


class Part(BaseModel):
    """A part of a stored file: what it does not hold is None or empty, and what it holds besides is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Moved(Part):
    """The largest and the mean of some angles, in degrees, or of some norms, relative."""

    largest: Size
    mean: Size


class Turned(Part):
    """What an adapter did to one layer, as `adapter_geometry` measured it."""

    module: Text
    orthogonality_error: Size | None = None
    rotation: Moved | None = None
    angles_moved: Moved
    norms_moved: Moved


class HeatMap(Part):
    """Angles, in degrees, of all pairs i < j of some rows of one layer's weight, row by row, before and after."""

    module: Text
    rows: Items
    before: list[Size]
    after: list[Size]

    @model_validator(mode="after")
    def _every_pair(self) -> HeatMap:
        pairs = len(self.rows) * (len(self.rows) - 1) // 2
        if not len(self.before) == len(self.after) == pairs:
            raise ValueError(f"angles of {pairs} pairs")
        return self


class Geometry(Part):
    """What `adapter_geometry` measured."""

    strict: bool = False
    subspaces: bool = False
    layers: list[Turned]
    heat_maps: list[HeatMap] = Field(default_factory=list)


def _as_geometry(value: Any) -> Any:
    """What was measured in the form that is known here, or None."""
    known = isinstance(value, dict) and value.get("format") == angles.FORMAT and value.get("layers")
    return value if known else None


def _as_answers(value: Any) -> Answers | None:
    return Answers.read(value) if isinstance(value, dict) else None


class Interval(Part):
    """An interval of the score over the draw of the test examples."""

    low: Number = None
    high: Number = None
    level: Number = None
    how: Text = ""

    @property
    def described(self) -> str:
        """How it was found, such as 95% Wilson."""
        return " ".join(part for part in ("" if self.level is None else f"{self.level:.0%}", self.how) if part)


class Forgetting(Part):
    """How much worse a model became at other text."""

    change: Number = None
    measure: Text = "the loss on other text"
    unit: Text = ""
    apart: Number = None
    """The mean distance of two different texts, where the change is a distance."""
    text: Text = ""


class Stopped(Part):
    """Where a run of a search was stopped early, since it was hopeless beside others."""

    step: Whole
    of: Whole
    """How many steps it would have had."""
    rule: Text = ""


class Record(Part):
    """One training run, as its file says. None stands for what the file does not hold."""

    path: Path = Path()
    content: dict[str, Any] = Field(default_factory=dict)
    """All that the file holds, as it is."""
    recipe: Text = ""
    task: Text = ""
    label: Text = ""
    method: Object = Field(default_factory=dict)
    """Its name, and the options that were given."""
    phase: Text = "seed"
    model: Text = ""
    metric: Text = ""
    lr_search: Text = ""
    """How its learning rate was found, in words."""
    lr: Rate = None
    seed: Whole = 0
    failed: Annotated[str | None, BeforeValidator(lambda value: value or None)] = None
    """Why it came to nothing, in a line."""
    final: bool = False
    """Whether another attempt would fail alike."""
    stopped: Stopped | None = None
    """Where the search of a rate gave it up; it has no test score then."""
    data: Object = Field(default_factory=dict)
    validation: Scores = Field(default_factory=dict)
    test: Scores = Field(default_factory=dict)
    untrained: Scores = Field(default_factory=dict)
    """The metrics before training, where they were measured."""
    answers: Annotated[Any, BeforeValidator(_as_answers)] = None
    """To the test examples, as `Answers`, where they are classes or numbers."""
    interval_about: Annotated[Interval | None, Field(alias="interval")] = None
    curve: Points = Field(default_factory=list)
    trainable_parameters: Number = None
    adapter_parameters: Number = None
    head_parameters: Number = None
    adapter_bytes: Number = None
    train_seconds: Number = None
    tokens_per_second: Number = None
    peak_memory_bytes: Number = None
    peak_memory_of: Text = ""
    kept_bytes: Number = None
    forgetting_about: Annotated[Forgetting | None, Field(alias="forgetting")] = None
    geometry: Annotated[Geometry | None, BeforeValidator(_as_geometry)] = None
    versions: Object = Field(default_factory=dict)
    hardware: Object = Field(default_factory=dict)

    @property
    def key(self) -> tuple[str, float | None, int]:
        """What distinguishes the run from the others of its folder."""
        return self.label, self.lr, self.seed

    @property
    def lost(self) -> bool:
        """Whether its rate is not to be chosen: it failed, or was worse than others where it was stopped."""
        return self.failed is not None or self.stopped is not None

    @property
    def score(self) -> float | None:
        """The metric on the test data."""
        return self.test.get(self.metric)

    @property
    def forgetting(self) -> float | None:
        """How much worse the model became at other text; negative where it became better."""
        return None if self.forgetting_about is None else self.forgetting_about.change

    @property
    def parts(self) -> dict[str, float]:
        """The score on each of several test sets, by name."""
        sets = self.data.get("sets")
        return {name: value for name, value in self.test.items() if isinstance(sets, dict) and name in sets}

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of an interval of the score over the draw of the test examples."""
        found = self.interval_about
        return None if found is None or found.low is None or found.high is None else (found.low, found.high)


P = TypeVar("P", bound=Part)


def parse(kind: type[P], content: Mapping[str, Any], path: Path) -> P:
    """A stored object as one of the classes above, with what is not printable written as escapes.

    Raises:
        ValueError: a value of another kind than it should be; the message names the file and the value.
    """
    try:
        return kind.model_validate(clean(dict(content)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        wanted = str(first["ctx"]["error"]) if first["type"] == "value_error" else _WANTED[first["type"]]
        raise ValueError(f"cannot read {path}: {where} should be {wanted}, not {shown(first['input'])}") from error


def read_run(path: Path) -> dict[str, Any]:
    """Read what a run has left at `path`.

    Raises:
        ValueError: it cannot be read, or holds no run, as it says neither which method was trained nor its label.
    """
    try:
        content = read_object(path)
        if not content.get("label") and not content.get("method"):
            raise ValueError(f"cannot read {path}: it holds no run, as it names no method")
    except ValueError as error:
        raise ValueError(f"{error}; remove it, and the same command trains that run again") from error
    return content


def record_of(content: Mapping[str, Any], path: Path) -> Record:
    """A run's record from what was stored at `path`; raises as `parse`."""
    found = parse(Record, {**content, "path": path, "content": {}}, path)
    return found.model_copy(update={"content": content})
