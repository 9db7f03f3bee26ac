"""Base classes of all configurations: target modules, the basis in the file, and the checks at construction."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from inspect import get_annotations
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from peft import PeftConfig, TaskType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isotune.adapter.operator import Adapter
from isotune.adapter.subspace import SubspaceBasis
from isotune.errors import AdapterFileError
from isotune.internals.safetensors_files import readable
from isotune.json_files import json_object
from isotune.methods.checks import check_types, require_choice, require_expressions, require_options, require_sizes
from isotune.methods.sizes import ChosenSize, check_budget
from isotune.model_card import WEIGHTS, update_list, write_card

FORMAT_VERSION = 4
"""Newest version of the adapter format (docs/adapter-format.md); each file is given the lowest that can express it."""


@dataclass
class IsotuneConfig(ChosenSize, PeftConfig):
    """Fields shared by all methods; each method's own dataclass adds the rest.

    Args:
        target_modules: names or a regular expression of the modules to adapt, or "all-linear".
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: modules trained in full and stored with the adapter, such as a new classification head.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers to which `layers_to_transform` refers.
        target_parameters: names of parameters to adapt that are not the weight of a layer: the fused experts of a
            mixture, such as ["experts.gate_up_proj", "experts.down_proj"]. Layers are then adapted only if
            target_modules names them.
        bias: which biases of the base model to train: "none", "all", or "isotune_only" (those of adapted layers). The
            method of the same name in PEFT calls the last "oft_only", "boft_only" or "hra_only", which also works.
        fan_in_fan_out: accepted for compatibility and ignored; the layer itself says how its weight is stored.
        init_weights: True starts at the identity; False starts at a random operator, for tests.
        rank_budget: trainable parameters of all adapted layers together, such as 80_000 or "80k", for which the layers'
            ranks or block sizes are chosen (see the guide on ranks). Not stored in the file.
        isotune_format: version of the adapter format.
        requires: what must be done before the file is read; PEFT alone fails with KeyError: 'ISOTUNE_…'.

    Raises:
        ValueError: a value is not allowed; the message names it.
        AdapterFileError: the file was written by a later version.
    """

    title: ClassVar[str] = ""
    """The method's name in tables, such as PSOFT; if empty, the registered name in capitals."""
    usual_learning_rate: ClassVar[float] = 1e-3
    """The learning rate around which a comparison searches for the best."""
    scaled_learning_rate: ClassVar[float | None] = None
    """The same with `scaled_generator`, where a method has it."""
    size_step: ClassVar[int] = 1
    """The first option in `size_names` must be a multiple of this."""
    presets: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}
    """Recipe names for this method with some options fixed -> the title and these options."""

    method_type: ClassVar[Any] = None
    runtime_fields: ClassVar[tuple[str, ...]] = ("rank_budget",)
    """Fields that apply only at run time and are never written, so that a file means the same to everyone."""
    format_since: ClassVar[Mapping[str, int]] = {}
    """Options that an earlier release would not know -> the first format version with them; a file that has one with
    another value than its default is of that version, and no other file has it at all."""
    peft_bias: ClassVar[str] = ""
    """The name of bias="isotune_only" in PEFT's own method of the same name."""

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    target_parameters: list[str] | None = field(default=None)
    bias: Literal["none", "all", "isotune_only"] = field(default="none")
    fan_in_fan_out: bool = field(default=False)
    init_weights: bool = field(default=True)
    rank_budget: int | str | None = field(default=None)
    isotune_format: int = field(default=1)
    requires: Literal["import isotune"] = field(default="import isotune")

    origin: ClassVar[str | None] = None
    """The folder or repository that the configuration was read from, whose tensors are loaded next; never written."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Refuse unknown options before the configuration is initialised, and note which are given."""
        names = config_fields(cls)
        require_options(cls.__name__, options, names)
        config: Any = super().__new__(cls)
        config.given = frozenset((*names[: len(args)], *options))
        return config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # PEFT takes a keyword of `from_pretrained` for the config only if the class itself is annotated with it.
        for name in cls.runtime_fields:
            owner = next(c for c in cls.__mro__ if name in get_annotations(c))
            if owner is not cls:
                # The evaluated type: its text may use names that the subclass's module does not import.
                cls.__annotations__[name] = get_type_hints(owner)[name]

    def __post_init__(self) -> None:
        if isinstance(self.isotune_format, bool) or self.isotune_format not in range(1, FORMAT_VERSION + 1):
            raise AdapterFileError(
                f"The adapter file has format version {self.isotune_format!r}; this release of isotune reads versions "
                f"1 to {FORMAT_VERSION}. Install a later release: pip install -U isotune."
            )
        if self.bias and self.bias == self.peft_bias:
            self.bias = "isotune_only"
        check_types(self)
        if self.task_type is not None:
            require_choice("task_type", self.task_type, [kind.value for kind in TaskType])
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = self.method_type
        self.layers_pattern = self.layers_pattern or None
        check_budget(self)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern is set but layers_to_transform is not; set layers_to_transform to the indices of the "
                "layers to adapt, or leave layers_pattern out."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform cannot be used when target_modules is a string (a regular expression or "
                "'all-linear'); give target_modules as a list, or put the layer indices into the expression."
            )
        for name, value in vars(self).items():
            if name == "alpha_pattern":
                require_expressions(name, value)
            elif name.endswith("_pattern") and isinstance(value, dict):
                require_sizes(name, value)
        for name in ("target_modules", "exclude_modules"):
            modules = getattr(self, name)
            if isinstance(modules, list):
                setattr(self, name, set(modules))
            elif isinstance(modules, str) and modules.lower() != "all-linear":
                require_expressions(name, modules)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read adapter_config.json from a folder or Hub repository, and refuse a damaged local adapter file.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's name.
            subfolder: folder inside it.
            kwargs: options that are not stored in the file, such as on_base_mismatch, and options of `huggingface_hub`.

        Raises:
            AdapterFileError: adapter_model.safetensors is truncated or not a safetensors file, or adapter_config.json
                is not valid JSON or holds a value that is not allowed; names the file.
            ValueError: an option in `kwargs` is not allowed.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        file = folder / WEIGHTS
        if file.is_file():
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                raise AdapterFileError(
                    f"{file} is damaged and cannot be read ({error}). Copy or download it again."
                ) from error
        try:
            config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ValueError, TypeError) as error:
            own = any(str(error).startswith(f"{name}=") for name in kwargs)
            if own or isinstance(error, AdapterFileError) or not (folder / "adapter_config.json").is_file():
                raise
            raise AdapterFileError(f"{folder / 'adapter_config.json'}: {error}") from error
        config.origin = str(pretrained_model_name_or_path)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the content of an adapter_config.json.

        Args:
            path_json_file: path of the file.
            kwargs: ignored, as in PEFT.

        Raises:
            AdapterFileError: the file does not hold a JSON object, or one that is nested too deeply.
        """
        return json_object(path_json_file, AdapterFileError)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, if the adapter's tensors are in the folder too, its card, README.md.

        PeftModel.save_pretrained calls this last for each adapter, so the card is written whether a script, a trainer
        or push_to_hub saves.

        Args:
            save_directory: the adapter's folder.
            kwargs: as in PEFT.
        """
        self.check_sized()
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        if (folder / WEIGHTS).is_file():
            readable(folder / WEIGHTS)
            write_card(folder, self)
            update_list(folder.parent)

    def to_dict(self) -> dict[str, Any]:
        """The fields that the file stores."""
        stored: dict[str, Any] = super().to_dict()
        for name in self.runtime_fields:
            stored.pop(name, None)
        for name, version in self.format_since.items():
            if stored[name] in ({}, getattr(type(self), name, {})):  # a class has no attribute for a default of {}
                del stored[name]
            else:
                stored["isotune_format"] = max(stored["isotune_format"], version)
        for name, value in stored.items():
            if isinstance(value, set):
                stored[name] = sorted(value)  # so that the same adapter always gives the same file
        return stored

    def base_rank(self, module: str) -> int | None:
        """The rank to which a module's own weight is truncated before the adapter acts; None if it stays whole."""
        return None

    def fit(self, module: str, shape: tuple[int, int], singular_values: Tensor) -> None:
        """Set what depends on the weight of a module; called if something else than sizes is asked for.

        Args:
            module: the module's name in the base model.
            shape: (out, in) of W.
            singular_values: of W, or of each expert, all of them, (1 or experts, n), descending.
        """

    @abstractmethod
    def build_operator(self, module: str, in_features: int, out_features: int) -> Adapter:
        """A new operator for this module, whose W is (out_features, in_features); the identity at the start.

        Raises:
            ValueError: the configuration does not fit a matrix of this shape.
        """

    @abstractmethod
    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> Adapter:
        """A new operator that fits tensors of an adapter file, made without knowing the shapes of the base model.

        Args:
            module: the module's name in the base model.
            tensors: the operator's tensors, by parameter name.

        Raises:
            KeyError, IndexError, ValueError: the tensors are not those of this method.
        """

    def build_basis(self, module: str, in_features: int, device: torch.device) -> SubspaceBasis | None:
        """What the file stores of a module's subspace, still empty; None if the method has no subspace."""
        return None

    def accumulated_rank(self, module: str) -> int | None:
        """The rank that a module has accumulated on earlier subspaces; None if they never moved."""
        return None


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The entry for a module by PEFT's rule: a key is the module's name, the end of it, or a regular expression."""
    return patterns.get(get_pattern_key(list(patterns), module), default)


def exactly(module: str) -> str:
    """The key of a pattern that names this module alone: by PEFT's rule a name is also that of all that end with it.

    Examples:
        >>> exactly("layers.0.q_proj")
        '^layers\\\\.0\\\\.q_proj'
    """
    return f"^{re.escape(module)}"


def type_of(config: Any) -> str:
    """The PEFT type of any configuration as its file names it, such as "ISOTUNE_PSOFT"."""
    kind = getattr(config, "peft_type", config)
    return str(getattr(kind, "value", kind))


def config_fields(config: type[IsotuneConfig]) -> tuple[str, ...]:
    """The names of all fields of a configuration class."""
    return tuple(f.name for f in fields(config))
