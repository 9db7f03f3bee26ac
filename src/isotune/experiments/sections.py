"""Parts of a recipe: the kinds of values they have, where data come from, and what language models are asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def as_list(value: Any) -> Any:
    """One value as a list of it."""
    return value if value is None or isinstance(value, list) else [value]


Rate = Annotated[FiniteFloat, Field(gt=0)]
Count = Annotated[PositiveInt, Field(lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
TRAINING_SEED = "train.seed"
NO_TRUTH = "should be a number or a text"
"""What errors say of `true` in the place of something else."""
Names = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


def _as_sets(value: Any) -> Any:
    return value if isinstance(value, Mapping) else as_list(value)


def _seed_of_the_training(value: Any, seed: ValidatorFunctionWrapHandler) -> Any:
    """A seed, or the words that stand for the training's, which the recipe puts in their place."""
    return value if value == TRAINING_SEED else seed(value)


def may_be_true(annotation: Any) -> bool:
    """Whether values of an annotated type may be true or false."""
    return annotation in (bool, Any) or any(map(may_be_true, get_args(annotation)))


class Section(BaseModel):
    """A mapping that has no other keys than its fields, and `true` only where something may be true."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, about: ValidationInfo) -> Any:
        """Refuse a truth value for a number, of which pydantic would make 1 or 0."""
        if isinstance(value, bool) and not may_be_true(cls.model_fields[str(about.field_name)].annotation):
            raise PydanticCustomError("truth_value", f"Input {NO_TRUTH}")
        return value


class HubTable(Section):
    """One split of a data set on the Hugging Face Hub, or of a file that `datasets` reads: `name: json, files: URL`."""

    name: str
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    split: str = "test"


class HubData(Section):
    """A data set on the Hugging Face Hub: its name, its configuration and which of its splits to use.

    `tests` names test sets that are splits of other data sets.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    tests: dict[str, HubTable] = Field(default_factory=dict)


class FileData(Section):
    """Local csv, tsv, json or jsonl files in `data.path`; `columns` names those of files without a header.

    A folder in place of a file holds a folder of images for each class; one with a folder `train` in it has its splits
    in folders of their names.
    `text`, `label` and `labels` stand for those of `data` where the files call them differently. A mapping as `test`
    names several test sets.
    """

    train: Names
    validation: Names | None = None
    test: Annotated[Names | dict[str, Names] | None, BeforeValidator(_as_sets)] = None
    columns: list[str] | None = None
    text: Annotated[Names, Field(max_length=2)] | None = None
    label: str | None = None
    labels: list[str | int] | None = None


class Data(Section):
    """Where the examples come from, which columns hold text and label, and what is held out for what.

    With `path` the `files` are read from that folder, or from the `folder` in it if there is one; without it the
    `builtin` or `hub` data are used where the recipe names them, else the `files` relative to the working directory.
    `rename` gives columns the names that the task knows them by, where a table has them under others.
    `classes` is a number of classes called 0, 1, …; `range` what a regression's numbers lie in; `hold_out` the number
    of training examples that become the validation set, and as many more become the test set where there is none.
    What is held out or halved is drawn with `split_seed`, which may be "train.seed", by `split_generator`: Python's,
    under which equal texts stay in one half, or numpy's default or legacy one, as other people's splits were drawn.
    """

    builtin: Literal["stdlib-docstrings", "stdlib-word-order", "digits", "mnist"] | None = None
    hub: HubData | None = None
    files: FileData | None = None
    path: str | None = None
    folder: str | None = None
    text: Names = Field(default_factory=lambda: ["text"], max_length=2)
    label: str = "label"
    labels: list[str | int] | None = None
    rename: dict[str, str] = Field(default_factory=dict)
    classes: Annotated[int, Field(ge=2)] | None = None
    range: tuple[FiniteFloat, FiniteFloat] | None = None
    split_validation_half: bool = False
    hold_out: Count | None = None
    split_seed: Annotated[Seed, WrapValidator(_seed_of_the_training)] = 0
    split_generator: Literal["python", "numpy", "numpy-legacy"] = "python"
    max_train: Count | None = None
    max_test: Count | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if self.path is not None and self.files is None:
            raise ValueError("data.path needs data.files, which names the files in that folder")
        if self.builtin is None and self.hub is None and self.files is None:
            raise ValueError("one of data.files, data.hub and data.builtin is needed")
        return self


class Padding(Section):
    """How the batches that a language model trains on are padded: on which side, with which token, to which multiple.

    `token_id` is the tokeniser's own unless given. Generation always pads on the left.
    """

    token_id: Annotated[int, Field(ge=0)] | None = None
    side: Literal["right", "left"] = "right"
    multiple_of: Count = 1


class Generation(Section):
    """How a language model answers, greedily or by beams; nothing is sampled.

    With `dtype` a copy of the model answers, its adapter merged, in that dtype. `temperature`, `top_p` and `top_k` are
    passed on and change nothing, since they are for sampling. `answer` says how one of several choices is found in
    what was said: the "first" in whichever case, or as LLM-Adapters' script does it.
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    num_beams: Count = 1
    temperature: Rate | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    answer: Literal["first", "llm-adapters"] = "first"
