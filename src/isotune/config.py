"""What every isotune configuration has: targets, the basis in the file, and what is checked at construction."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from isotune.errors import AdapterFileError
from isotune.operators import Operator

FORMAT_VERSION = 1
"""Version of the adapter file that this release writes; docs/adapter-format.md describes each."""

# Known only while a model runs, so never written to the file: the file must mean the same to whoever loads it.
_RUNTIME_FIELDS = ("on_base_mismatch", "subspace_cache")


@dataclass
class IsotuneConfig(PeftConfig):
    """Fields shared by all methods; each method's own dataclass adds the rest.

    Args:
        target_modules: names or a regular expression of the modules to adapt, or "all-linear".
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: modules trained in full and stored with the adapter, such as a new classification head.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers to which `layers_to_transform` refers.
        rank_pattern: module name or regular expression -> rank, where it differs from r.
        alpha_pattern: module name or regular expression -> alpha, where it differs from the method's own.
        bias: which biases of the base model are trained: "none", "all", or "isotune_only" (those of adapted layers).
        fan_in_fan_out: accepted for compatibility; how a weight is stored is read off the layer itself.
        init_weights: True starts at the identity; False starts at a random operator, for tests.
        basis: "pinned" stores what fixes the subspace on the same base (small, checks the base at load);
            "embedded" stores the subspace itself (exact on any base, larger).
        basis_seed: seed of the fixed Gaussian matrix of the pin.
        on_base_mismatch: "error" refuses a base that a pinned adapter was not trained on, "warn" loads all the same.
            Not stored in the file.
        subspace_cache: whether computed subspaces are kept on disk (see ISOTUNE_CACHE). Not stored in the file.
        isotune_format: version of the adapter file.

    Raises:
        ValueError: a value outside what is allowed; the message names it.
        AdapterFileError: the file was written by a later version.
    """

    method_type: ClassVar[Any] = None

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "isotune_only"] = field(default="none")
    fan_in_fan_out: bool = field(default=False)
    init_weights: bool = field(default=True)
    basis: Literal["pinned", "embedded"] = field(default="pinned")
    basis_seed: int = field(default=0)
    on_base_mismatch: Literal["error", "warn"] = field(default="error")
    subspace_cache: bool = field(default=True)
    isotune_format: int = field(default=FORMAT_VERSION)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # PEFT takes a keyword of `from_pretrained` for the config only if the class itself is annotated with it.
        for name in _RUNTIME_FIELDS:
            cls.__annotations__.setdefault(name, IsotuneConfig.__annotations__[name])
            if name not in cls.__dict__:
                setattr(cls, name, getattr(IsotuneConfig, name))

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = self.method_type
        if self.isotune_format not in range(1, FORMAT_VERSION + 1):
            raise AdapterFileError(
                f"The adapter file has format version {self.isotune_format!r}; this release of isotune reads versions "
                f"1 to {FORMAT_VERSION}. Install a later release: pip install -U isotune."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        require_choice("bias", self.bias, ("none", "all", "isotune_only"))
        require_choice("basis", self.basis, ("pinned", "embedded"))
        require_choice("on_base_mismatch", self.on_base_mismatch, ("error", "warn"))
        for name, rank in self.rank_pattern.items():
            require_positive_integer(f"rank_pattern[{name!r}]", rank)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern is set but layers_to_transform is not; it says which of those layers to adapt."
            )
        if isinstance(self.target_modules, str):
            if self.layers_to_transform is not None:
                raise ValueError(
                    "layers_to_transform cannot be used when target_modules is a string (a regular expression or "
                    "'all-linear'); give target_modules as a list, or put the layer numbers into the expression."
                )
            if self.target_modules.lower() != "all-linear":
                _require_expression("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            _require_expression("exclude_modules", self.exclude_modules)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read adapter_config.json of a folder or Hub repository; a local adapter file that is damaged is refused.

        Raises:
            AdapterFileError: adapter_model.safetensors is truncated or no safetensors file.
        """
        file = Path(pretrained_model_name_or_path) / (subfolder or "") / "adapter_model.safetensors"
        if file.is_file():
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                raise AdapterFileError(
                    f"{file} is damaged and cannot be read ({error}). Copy or download it again."
                ) from error
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields that the file stores."""
        stored: dict[str, Any] = super().to_dict()
        for name in _RUNTIME_FIELDS:
            stored.pop(name, None)
        for name, value in stored.items():
            if isinstance(value, set):
                stored[name] = sorted(value)  # the same adapter gives the same file
        return stored

    def rank_of(self, module: str) -> int:
        """The rank for a module by `rank_pattern`, else r."""
        return int(by_pattern(self.rank_pattern, module, self.default_rank()))

    def scale_of(self, module: str) -> float:
        """The factor s of the update of a module."""
        return 1.0

    @abstractmethod
    def default_rank(self) -> int:
        """The rank of modules that no pattern matches."""

    @abstractmethod
    def build_operator(self, rank: int) -> Operator:
        """A new operator on rank coordinates, the identity if `init_weights`."""


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return patterns.get(get_pattern_key(list(patterns), module), default)


def require_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`, naming the nearest."""
    choices = tuple(allowed)
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.{hint}")


def require_positive_integer(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is an integer above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer of at least 1.")


def check_cayley_options(use_neumann: bool, terms: int, bound: float | None) -> None:
    """Raise a ValueError for options of the Cayley transform that are not allowed or have no effect."""
    require_positive_integer("num_cayley_neumann_terms", terms)
    if bound is None:
        return
    if not use_neumann:
        raise ValueError(
            "cayley_neumann_eps bounds the generator of the Neumann series and has no effect with "
            "use_cayley_neumann=False; leave it None or set use_cayley_neumann=True."
        )
    if not 0.0 < bound < 1.0:
        raise ValueError(
            f"cayley_neumann_eps={bound!r} is not allowed; it must be between 0 and 1, where the series converges."
        )


def _require_expression(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name}={value!r} is not a regular expression ({error}); give a list for plain names."
        ) from None


def config_fields(config: type[IsotuneConfig]) -> tuple[str, ...]:
    """The names of all fields of a configuration class."""
    return tuple(f.name for f in fields(config))
