"""What every isotune configuration has: targets, the basis in the file, and what is checked at construction."""

from __future__ import annotations

import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from inspect import get_annotations
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isotune.adapter.operator import DenseOperator, Operator
from isotune.adapter.subspace import Form, InputRotation, SubspaceUpdate
from isotune.errors import AdapterFileError, IsotuneWarning
from isotune.subspace.pinning import pin_width

FORMAT_VERSION = 1
"""Version of the adapter file that this release writes; docs/adapter-format.md describes each."""


@dataclass
class IsotuneConfig(PeftConfig):
    """Fields shared by all methods; each method's own dataclass adds the rest.

    Args:
        target_modules: names or a regular expression of the modules to adapt, or "all-linear".
        exclude_modules: names or a regular expression of modules to leave out.
        modules_to_save: modules trained in full and stored with the adapter, such as a new classification head.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers to which `layers_to_transform` refers.
        target_parameters: names of parameters to adapt that are no layer's weight: the fused experts of a mixture, such
            as ["experts.gate_up_proj", "experts.down_proj"]. Layers are then adapted only where target_modules says so.
        bias: which biases of the base model are trained: "none", "all", or "isotune_only" (those of adapted layers).
        fan_in_fan_out: accepted for compatibility; how a weight is stored is read off the layer itself.
        init_weights: True starts at the identity; False starts at a random operator, for tests.
        isotune_format: version of the adapter file.

    Raises:
        ValueError: a value outside what is allowed; the message names it.
        AdapterFileError: the file was written by a later version.
    """

    title: ClassVar[str] = ""
    """How the method is written in tables, such as PSOFT; empty: its name in capitals."""
    usual_learning_rate: ClassVar[float] = 1e-3
    """The learning rate around which a comparison looks for the best."""
    size_names: ClassVar[Mapping[str, str]] = {}
    """Option that sets how large the adapter is -> its letter in papers; a comparison at equal size sets the first."""
    size_step: ClassVar[int] = 1
    """What that first option must be a multiple of."""
    presets: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}
    """Name in a recipe of a method that is this one with some options fixed -> its title and those options."""

    method_type: ClassVar[Any] = None
    runtime_fields: ClassVar[tuple[str, ...]] = ()
    """Known only while a model runs, so never written: the file must mean the same to whoever loads it."""

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    target_parameters: list[str] | None = field(default=None)
    bias: Literal["none", "all", "isotune_only"] = field(default="none")
    fan_in_fan_out: bool = field(default=False)
    init_weights: bool = field(default=True)
    isotune_format: int = field(default=FORMAT_VERSION)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # PEFT takes a keyword of `from_pretrained` for the config only if the class itself is annotated with it.
        for name in cls.runtime_fields:
            owner = next(c for c in cls.__mro__ if name in get_annotations(c))
            if owner is not cls:
                # The type and not its text, which names what the module of the subclass need not know.
                cls.__annotations__[name] = get_type_hints(owner)[name]

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
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters={self.target_parameters!r} must be a list of names, not a string.")
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
        for name in self.runtime_fields:
            stored.pop(name, None)
        for name, value in stored.items():
            if isinstance(value, set):
                stored[name] = sorted(value)  # the same adapter gives the same file
        return stored

    @abstractmethod
    def build_operator(self, module: str, in_features: int, out_features: int) -> Operator:
        """A new operator for a module whose W is (out_features, in_features), the identity if `init_weights`.

        Raises:
            ValueError: the configuration does not fit a matrix of this shape.
        """

    @abstractmethod
    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> Operator:
        """A new operator into which these tensors of an adapter file fit, where the base's shapes are not known.

        Raises:
            KeyError, IndexError, ValueError: they are not tensors of this method.
        """

    @abstractmethod
    def build_form(self, module: str, in_features: int, device: torch.device) -> Form:
        """A new form for that operator."""


@dataclass
class SubspaceConfig(IsotuneConfig):
    """Fields shared by the methods that act on the principal subspace of each weight.

    Args:
        r: rank of the principal subspace; at most the smaller side of each adapted weight.
        rank_pattern: module name or regular expression -> rank, where it differs from r.
        alpha_pattern: module name or regular expression -> alpha, where it differs from the method's own.
        basis: "pinned" stores what fixes the subspace on the same base (small, checks the base at load);
            "embedded" stores the subspace itself (exact on any base, larger).
        basis_seed: seed of the fixed Gaussian matrix of the pin.
        on_base_mismatch: "error" refuses a base that a pinned adapter was not trained on, "warn" loads all the same.
            Not stored in the file.
        subspace_cache: whether computed subspaces are kept on disk (see ISOTUNE_CACHE). Not stored in the file.
    """

    runtime_fields = ("on_base_mismatch", "subspace_cache")
    size_names = {"r": "r"}  # noqa: RUF012 (declared as a ClassVar above)

    r: int = field(default=32)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    basis: Literal["pinned", "embedded"] = field(default="pinned")
    basis_seed: int = field(default=0)
    on_base_mismatch: Literal["error", "warn"] = field(default="error")
    subspace_cache: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_integer("r", self.r)
        require_choice("basis", self.basis, ("pinned", "embedded"))
        require_choice("on_base_mismatch", self.on_base_mismatch, ("error", "warn"))
        for name, rank in self.rank_pattern.items():
            require_positive_integer(f"rank_pattern[{name!r}]", rank)

    @property
    def solver(self) -> str:
        """Which solver finds the subspaces."""
        return "auto"

    @property
    def reader_power(self) -> float:
        """The power of the singular values that the reader has, of 1; the writer has the rest."""
        return 0.0

    @property
    def alpha(self) -> float | None:
        """The method's own alpha, by which over r an update is scaled; None for r."""
        return None

    @property
    def update_dropout(self) -> float:
        """Dropout on the input of the update."""
        return 0.0

    def rank_of(self, module: str) -> int:
        """The rank for a module by `rank_pattern`, else r."""
        return int(by_pattern(self.rank_pattern, module, self.r))

    def scale_of(self, module: str) -> float:
        """The factor s of the update of a module: alpha / r, both by pattern."""
        alpha = by_pattern(self.alpha_pattern, module, self.alpha)
        return 1.0 if alpha is None else float(alpha) / self.rank_of(module)

    def build_form(self, module: str, in_features: int, device: torch.device) -> SubspaceUpdate:
        """The update of the principal subspace, not placed yet."""
        rank = self.rank_of(module)
        return SubspaceUpdate(
            rank,
            in_features,
            reader_power=self.reader_power,
            pin_width=pin_width(rank, in_features) if self.basis == "pinned" else None,
            device=device,
        )

    def build_operator(self, module: str, in_features: int, out_features: int) -> DenseOperator:
        """A new operator on the coordinates of the subspace."""
        rank, limit = self.rank_of(module), min(in_features, out_features)
        if rank > limit:
            raise ValueError(
                f"r={rank} is too large for the module {module!r}, whose weight is {out_features} × {in_features}; the "
                f"rank may be at most {limit}. Choose a smaller r, give this module its own with "
                f"rank_pattern={{{module!r}: {limit}}}, or exclude it with exclude_modules."
            )
        return self.subspace_operator(rank)

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> DenseOperator:
        """The operator of the rank that the configuration says."""
        return self.subspace_operator(self.rank_of(module))

    @abstractmethod
    def subspace_operator(self, rank: int) -> DenseOperator:
        """A new operator on rank coordinates, the identity if `init_weights`."""


@dataclass
class RotationConfig(IsotuneConfig):
    """Fields shared by the methods that rotate all inputs of each layer."""

    def build_form(self, module: str, in_features: int, device: torch.device) -> InputRotation:
        """y = host(x M)."""
        return InputRotation()

    def operator_of(self, module: str, tensors: Mapping[str, Tensor]) -> Operator:
        """The operator of the widths that the tensors have."""
        return self.build_operator(module, *self.widths_of(tensors))

    @abstractmethod
    def widths_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """in_features and out_features that go with the tensors of an operator; any where they do not matter."""


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


def check_probability(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} is not allowed; it must be in [0, 1).")


def check_alphas(name: str, alpha: float | None, pattern: Mapping[str, float]) -> None:
    """Raise a ValueError unless every alpha is a finite number above 0, or the method's own None."""
    if not all(a is None or 0 < a < math.inf for a in (alpha, *pattern.values())):
        raise ValueError(
            f"{name}={alpha!r} with alpha_pattern={pattern!r} is not allowed; each must be above 0, or {name} None "
            "for r."
        )


def check_weight(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a finite number of at least 0."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} is not allowed; it must be a number of at least 0.")


def divisor_for(name: str, value: int, module: str, width: int, adjust: str = "refuse") -> int:
    """`value` if it divides the inputs of a module, else the nearest divisor, the lower of two, if that is allowed.

    Raises:
        ValueError: it does not divide them; the message names the nearest that do.
    """
    if value <= width and width % value == 0:
        return value
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - value), d))
    if adjust == "nearest":
        _say_once(f"{name}={value} does not divide the {width} inputs of some modules; {nearest} is used there.")
        return nearest
    around = [max((d for d in divisors if d < value), default=0), min((d for d in divisors if d > value), default=0)]
    names = " or ".join(str(d) for d in around if d)
    raise ValueError(
        f"{name}={value} does not divide the {width} inputs of {module!r}; the nearest that do are {names}. Choose one "
        "that divides the width of every adapted module, or exclude this one with exclude_modules."
    )


@lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    warnings.warn(message, IsotuneWarning, stacklevel=2)


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
