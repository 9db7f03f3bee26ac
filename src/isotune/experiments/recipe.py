"""Recipes: what to train on what and how, as validated YAML plus `key=value` overrides."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from isotune.experiments import registry
from isotune.experiments.sections import (
    TRAINING_SEED,
    Count,
    Data,
    Generation,
    Padding,
    Rate,
    Section,
    Seed,
    as_list,
)
from isotune.experiments.text import shown

Metric = Literal["accuracy", "matthews_correlation", "pearson", "loss"]
TaskName = Literal[
    "text-classification",
    "text-regression",
    "image-classification",
    "chat",
    "completion",
    "preference",
    "multiple-choice",
    "math",
]
LESS_IS_BETTER = ("loss",)
METRICS: dict[str, tuple[str, ...]] = {"chat": ("loss",), "completion": ("loss",), "preference": ("accuracy", "loss")}
"""The metrics of tasks that do not have all of them, the usual one first."""
_ASKED = ("multiple-choice", "math")
_TASKS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("prompt_with_input", "test_prompt", "learn", "generation"), _ASKED),
    "padding": (*_ASKED, "chat", "completion"),
}
"""The tasks that some keys are for."""
ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "adapter_lr"), "lr"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs", "epoch"), "epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "batch_size"),
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"), "max_length"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "schedule"),
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model"), "model"),
    "torch_dtype": "dtype",
    "bf16": "autocast",
    "output_dir": "output",
}
"""What other trainers call a key -> its last part here."""


def merit(metric: str, scores: Mapping[str, float] | None) -> float:
    """How good scores are by one metric, the more the better; minus infinity where they do not have it."""
    if scores is None or metric not in scores:
        return -math.inf
    return -scores[metric] if metric in LESS_IS_BETTER else scores[metric]


class RecipeError(ValueError):
    """A recipe or an override is not valid; the message is one line for the person who wrote it."""


def _known_method(name: str) -> str:
    if name not in registry.entries():
        *first, last = map(repr, registry.entries())
        expected = f"{', '.join(first)} or {last}"
        raise PydanticCustomError("literal_error", "should be {expected}", {"expected": expected})
    return name


MethodName = Annotated[str, AfterValidator(_known_method)]
Tracker = Literal["tensorboard", "wandb", "trackio"]


class Method(BaseModel):
    """A method by name, the options of its adapter configuration, and training settings of its own.

    The options are checked against the method's configuration class by `methods.checked`.
    """

    model_config = ConfigDict(extra="allow")
    name: MethodName
    train: dict[str, Any] = Field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options for the adapter configuration."""
        return dict(self.model_extra or {})


MethodSpec = Annotated[Method, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)]


class Moving(Section):
    """Subspaces that move during training; the keys are the options of `isotune.moving.MovingSchedule`."""

    every: Count = 1
    unit: Literal["step", "epoch"] = "epoch"
    select: Literal["top", "bottom", "band", "warm"] = "top"
    optimizer_state: Literal["reset", "keep", "project"] = "reset"
    max_rank: Count | None = None
    seed: Seed = 0


class Reinit(Section):
    """Rows of UORA that are re-initialised; the keys are the options of `isotune.moving.UoraSchedule`."""

    threshold: Rate
    weight: Annotated[FiniteFloat, Field(gt=0, le=1)]
    every: Count
    unit: Literal["step", "epoch"] = "step"


class Train(Section):
    """How to train: AdamW with a learning rate for the adapter (several: a search) and one for the head.

    `batch_size` is that of an update, computed in `gradient_accumulation` equal parts; `warmup_steps` goes over
    `warmup_ratio`; `decay_all` decays biases and norms, too. With `autocast` torch computes in bfloat16 where its
    autocast does, whatever the dtype of the weights. `report_to` names what the course of training is shown in besides.
    `moving` moves the subspaces of methods that have them, and `reinit` renews rows of UORA.
    """

    epochs: FiniteFloat = Field(default=3, gt=0)
    max_steps: Count | None = None
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    eval_batch_size: Count = 64
    lr: Annotated[list[Rate], BeforeValidator(as_list), Field(min_length=1)] = Field(default_factory=lambda: [1e-3])
    lr_head: Rate | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: FiniteFloat = Field(default=0.1, ge=0, lt=1)
    warmup_steps: Count | None = None
    weight_decay: FiniteFloat = Field(default=0.0, ge=0)
    decay_all: bool = False
    max_grad_norm: Rate = 1.0
    max_length: Count = 128
    seed: Seed = 0
    select_best: bool = True
    eval_steps: Count | None = None
    group_by_length: bool = False
    autocast: bool = False
    start_from_head: bool = False
    report_to: Annotated[list[Tracker], BeforeValidator(as_list)] = Field(default_factory=list)
    moving: Moving | None = None
    reinit: Reinit | None = None

    def described(self) -> dict[str, Any]:
        """As JSON, but for what changes no result."""
        unused = {name for name in ("moving", "reinit") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude={"report_to", *unused})

    @model_validator(mode="after")
    def _whole_parts(self) -> Train:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not {self.gradient_accumulation} equal parts: "
                "train.gradient_accumulation must divide it"
            )
        return self


class Preference(Section):
    """How answers are preferred by DPO: `beta` is how much it costs to move away from the base model."""

    beta: Rate = 0.1


class Recipe(Section):
    """A whole experiment: model, task, data, method, training and where the results go.

    `group` is the part of its suite that a task is averaged in. For language models: `dtype` is that of the frozen
    weights, `prompt` a text with the columns' names in braces, `score` how answers are found. `prompt_with_input` is
    the prompt of questions that come with an {input}, and `test_prompt` that of questions that are only judged. Learnt
    is the "answer", what stands "after-prompt" if the prompt is tokenised alone, or the whole "text".
    For images: `image_size` is the side in pixels of the squares that they are made, where not the model's own.
    """

    description: str = ""
    group: str | None = None
    task: TaskName = "text-classification"
    model: str
    pooling: Literal["auto", "native", "mean"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompt: str | None = None
    prompt_with_input: str | None = None
    test_prompt: str | None = None
    learn: Literal["answer", "after-prompt", "text"] = "answer"
    padding: Padding = Field(default_factory=Padding)
    generation: Generation = Field(default_factory=Generation)
    score: Literal["generation", "likelihood", "loss"] = "generation"
    max_new_tokens: Count = 32
    image_size: Count | None = None
    data: Data
    method: MethodSpec
    baselines: list[MethodSpec] = Field(default_factory=list)
    train: Train = Field(default_factory=Train)
    preference: Preference = Field(default_factory=Preference)
    metric: Metric = "accuracy"
    choose_by: Metric | None = None
    check_saved: bool = False
    score_untrained: bool | None = None
    measure_forgetting: bool = True
    chart: bool = False
    output: str | None = None

    def training(self, method: Method) -> Train:
        """The training settings of one method: those of the recipe with the method's own put over them."""
        return Train.model_validate({**self.train.model_dump(), **method.train})

    @property
    def chosen_by(self) -> str:
        """The metric by whose validation score runs are chosen."""
        return self.choose_by or self.metric

    @property
    def methods(self) -> list[Method]:
        """All methods in the order in which they are trained; the recipe's own is the last."""
        return [*self.baselines, self.method]

    @model_validator(mode="before")
    @classmethod
    def _usual_metric(cls, raw: Any) -> Any:
        known = METRICS.get(str(raw.get("task"))) if isinstance(raw, Mapping) else None
        return {**raw, "metric": known[0]} if known and raw.get("metric") is None else raw

    @model_validator(mode="after")
    def _metric_of_the_task(self) -> Recipe:
        for key, metric in (("metric", self.metric), ("choose_by", self.chosen_by)):
            known = METRICS.get(self.task, (metric,))
            if metric not in known:
                raise ValueError(f"the task {self.task} has the {key} {' or '.join(known)}, not {metric}")
        return self

    @model_validator(mode="after")
    def _keys_of_the_task(self) -> Recipe:
        for key, known in _TASKS_OF.items():
            usual = type(self).model_fields[key].get_default(call_default_factory=True)
            if self.task not in known and getattr(self, key) != usual:
                raise ValueError(f"{key} is for the tasks {', '.join(known)}, not for {self.task}")
        return self

    @model_validator(mode="after")
    def _split_by_the_trainings_seed(self) -> Recipe:
        if str(self.data.split_seed) == TRAINING_SEED:
            self.data = self.data.model_copy(update={"split_seed": self.train.seed})
        return self

    @model_validator(mode="after")
    def _start_from_head(self) -> Recipe:
        heads = [m for m in self.baselines if m.name == "head"]
        if self.train.start_from_head and not heads:
            raise ValueError("train.start_from_head needs 'head' among the baselines, whose head is started from")
        return self


def validate(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Turn a parsed mapping into a Recipe.

    Raises:
        RecipeError: about the first thing that is wrong, after `where`.
    """
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, Recipe)}") from error
    try:
        for method in recipe.methods:
            _check_own_settings(recipe.training(method), method.name, where)
    except ValidationError as error:
        raise RecipeError(f"{where}: in 'train' of method {method.name}: {_explain(error, Train)}") from error
    return recipe


def _check_own_settings(train: Train, method: str, where: str) -> None:
    """Refuse settings that are another method's, and UORA without the numbers that its paper does not tell."""
    if registry.entry(method).renews_rows and train.reinit is None:
        raise RecipeError(
            f"{where}: {method} needs train.reinit with threshold, weight and every, which have no default since the "
            "paper's are not public; give it in the 'train' of this method"
        )
    for key, fits in (("moving", "on_subspaces"), ("reinit", "renews_rows")):
        known = [name for name, entry in registry.entries().items() if getattr(entry, fits)]
        if getattr(train, key) is not None and method not in known:
            raise RecipeError(
                f"{where}: train.{key} is for {', '.join(known)}, and not for {method}; give it in the 'train' of "
                "those methods alone"
            )


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys below a recipe section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}.")


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that the values of an annotated key are made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def meant(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """The end of an error: the valid name most like `name`, or whose last part it, or its name elsewhere, is."""
    options = list(valid)
    leaf = name.rpartition(".")[2]
    leaves = [option.rpartition(".")[2] for option in options]
    leaf = leaf if leaf in leaves else ELSEWHERE.get(leaf, leaf)
    same_leaf = [option for option, own in zip(options, leaves, strict=True) if own == leaf]
    near = same_leaf or difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    # Unknown names first: a misspelt required key is both unknown and missing, and the former says more.
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    path = [part for part in first["loc"] if isinstance(part, str)]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        section = root
        for part in path[:-1]:
            section = sections_in(section.model_fields[part].annotation)[0]
        return f"unknown key {key!r}: allowed here are {', '.join(section.model_fields)}" + meant(key, keys_of(root))
    if first["type"] == "missing":
        return f"the key {key!r} is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    said = f"{key}: {first['msg'].removeprefix('Input ')}, not {shown(first['input'])}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        expected = first["ctx"]["expected"].replace(" or ", ", ").split(", ")
        said += meant(first["input"], (word.strip("'") for word in expected))
    return said
