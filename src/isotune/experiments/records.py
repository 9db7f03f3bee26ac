"""What a run leaves: its record, and what is read from one that may be old, damaged or made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from isotune.experiments import angles
from isotune.experiments.files import read_object
from isotune.experiments.text import clean, shown

FORMAT = 1
"""Version of a run's record and of what a comparison or a training writes about its runs."""

LARGEST = 1e100
"""Numbers beyond it are no measurement."""


def number(value: Any) -> float | None:
    """A finite number of JSON as a float; None for NaN, an infinity and whatever is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        return None
    return float(value)


def _as_number(value: Any) -> float | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    found = number(value)
    if found is None:
        raise ValueError("a number")
    return found


def _as_size(value: Any) -> float:
    found = number(value)
    if found is None:
        raise ValueError("a number")
    return found


def _as_rate(value: Any) -> float | None:
    found = _as_number(value)
    if found is not None and found <= 0:
        raise ValueError("a number above 0")
    return found


def _as_whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise ValueError("a number without a fraction")
    return value


def _either(kind: type, called: str, empty: Callable[[], Any]) -> BeforeValidator:
    """A value of one kind, and of nothing the empty one."""

    def check(value: Any) -> Any:
        if value is not None and not isinstance(value, kind):
            raise ValueError(called)
        return empty() if value is None else value

    return BeforeValidator(check)


def _numbers(value: Any) -> Any:
    return {key: found for key, one in value.items() if (found := number(one)) is not None}


Number = Annotated[float | None, BeforeValidator(_as_number)]
Size = Annotated[float, BeforeValidator(_as_size)]
Rate = Annotated[float | None, BeforeValidator(_as_rate)]
Whole = Annotated[int, BeforeValidator(_as_whole)]
Text = Annotated[str, _either(str, "text", str)]
Object = Annotated[dict[str, Any], _either(dict, "an object", dict)]
Items = Annotated[list[Any], _either(list, "a list", list)]
Scores = Annotated[dict[str, float], BeforeValidator(_numbers), _either(dict, "an object", dict)]
Points = Annotated[list[Scores], _either(list, "a list", list)]


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
    orthogonality_error: Size
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
    text: Text = ""


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
    lr: Rate = None
    seed: Whole = 0
    failed: Annotated[str | None, BeforeValidator(lambda value: value or None)] = None
    """Why it came to nothing, in a line."""
    final: bool = False
    """Whether another attempt would fail alike."""
    data: Object = Field(default_factory=dict)
    validation: Scores = Field(default_factory=dict)
    test: Scores = Field(default_factory=dict)
    untrained: Scores = Field(default_factory=dict)
    """The metrics before training, where they were measured."""
    chosen: bool = True
    """Whether a training found its rate the best of those tried."""
    interval_about: Annotated[Interval | None, Field(alias="interval")] = None
    curve: Points = Field(default_factory=list)
    trainable_parameters: Number = None
    adapter_parameters: Number = None
    head_parameters: Number = None
    adapter_bytes: Number = None
    train_seconds: Number = None
    tokens_per_second: Number = None
    peak_memory_bytes: Number = None
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


def parse(kind: type[Part], content: Mapping[str, Any], path: Path) -> Any:
    """A stored object as one of the classes above.

    Raises:
        ValueError: a value of another kind than it should be; the message names the file and the value.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        wanted = str(first["ctx"]["error"]) if first["type"] == "value_error" else _KINDS.get(first["type"], "there")
        raise ValueError(f"cannot read {path}: {where} should be {wanted}, not {shown(first['input'])}") from error


_KINDS = {"model_type": "an object", "dict_type": "an object", "list_type": "a list", "string_type": "text"}
_KINDS |= {"bool_type": "true or false", "bool_parsing": "true or false"}


def record_of(content: Mapping[str, Any], path: Path) -> Record:
    """A run's record.

    Args:
        content: what was stored.
        path: where, for errors.

    Raises:
        ValueError: a value of another kind than it should be; the message names the file and the value.
    """
    plain = clean(dict(content))
    found: Record = parse(Record, {**plain, "path": path, "content": content}, path)
    return found


def read_record(path: Path) -> Record:
    """A run's record from its file.

    Raises:
        ValueError: the file cannot be read, or holds a value of another kind than it should be; the message names it.
    """
    return record_of(read_object(path), path)


class Training(Part):
    """What `result.json` says of a training."""

    recipe: Object
    metric: Text
    seed: Whole = 0
    data: Object
    versions: Object = Field(default_factory=dict)
    hardware: Object = Field(default_factory=dict)
    runs: list[Object]
    saved: dict[str, Scores] = Field(default_factory=dict)
    """The metrics of the saved adapter, "reloaded" and "merged"."""
    records: list[Record] = Field(default_factory=list)


def read_training(content: Mapping[str, Any], path: Path) -> Training:
    """What a training stored, with the records of its runs.

    Args:
        content: of `result.json`.
        path: of the file.

    Raises:
        ValueError: a value of another kind than it should be; the message names the file and the value.
    """
    found: Training = parse(Training, {**clean(dict(content)), "records": []}, path)
    known = {"recipe": path.parent.name, "task": found.recipe.get("task"), "model": found.recipe.get("model")}
    known |= {"metric": found.metric, "data": found.data, "seed": found.seed, "phase": "search"}
    known |= {"versions": found.versions, "hardware": found.hardware}
    # An earlier release stored with a run only what differs from run to run.
    runs = [{**known, **run} for run in found.runs]
    records = [record_of(run, path) for run in runs]
    named = [r if r.label else r.model_copy(update={"label": str(r.method.get("name"))}) for r in records]
    return found.model_copy(update={"records": named})
