"""Every method that a recipe can name: isotune's from `isotune.methods.METHODS`, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isotune.methods import METHODS
from isotune.methods.subspace import MovableConfig
from isotune.methods.uora import UoraConfig

HEADS = ("classifier", "score")
"""What transformers calls the last layer of its sequence classifiers; PEFT trains and saves these by itself."""

SHARED_OPTIONS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Which layers are adapted: in a comparison the same for all methods, whichever method a recipe gives them to."""


@dataclass(frozen=True)
class Entry:
    """What experiments and reports know of a method, by its name in a recipe.

    Args:
        usual_learning_rate: around which a comparison looks for the best.
        base: the method whose configuration class it is; None for what is no adapter.
        fixed: options of that class which the name fixes.
        size_names: option that sets how large the adapter is -> its letter in papers; the first one is matched.
        size_step: what the first of these must be a multiple of.
        scaled_learning_rate: as `usual_learning_rate`, with scaled_generator.
    """

    name: str
    title: str
    usual_learning_rate: float
    base: str | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    size_names: Mapping[str, str] = field(default_factory=dict)
    size_step: int = 1
    scaled_learning_rate: float | None = None

    def rate_with(self, options: Mapping[str, Any]) -> float:
        """The usual learning rate of the method with these options."""
        scaled = {**self.fixed, **options}.get("scaled_generator") and self.scaled_learning_rate
        return scaled or self.usual_learning_rate

    @property
    def on_subspaces(self) -> bool:
        """Whether it is one of isotune's methods on subspaces of the weights."""
        return self.base in METHODS and issubclass(METHODS[self.base], MovableConfig)

    @property
    def renews_rows(self) -> bool:
        """Whether rows of its random matrices are re-initialised in training, by `train.reinit` of a recipe."""
        return self.base in METHODS and issubclass(METHODS[self.base], UoraConfig)

    @property
    def size_option(self) -> str | None:
        """The option by which a comparison at equal size sets the number of trainable parameters, if there is one."""
        return next(iter(self.size_names), None)

    def title_of(self, options: Mapping[str, Any]) -> str:
        """The method with its options as people write it, such as PSOFT r=46."""
        parts = [self.title]
        for key, value in options.items():
            if key in ("psoft_mag_a", "psoft_mag_b"):
                vector = "α" if key == "psoft_mag_a" else "β"
                parts.append(vector if value else f"no {vector}")
            elif key == "psoft_orth":
                parts.append("strict" if value else "free R")
            elif key == "scaled_generator":
                parts.append("scaled" if value else "not scaled")
            elif key not in ("name", *SHARED_OPTIONS):
                parts.append(f"{self.size_names.get(key, key)}={value}")
        return " ".join(parts)


def _lora(name: str, title: str, **fixed: Any) -> Entry:
    return Entry(name, title, 6e-4, "lora", fixed, {"r": "r"})


_OTHERS = (
    _lora("lora", "LoRA"),
    _lora("rslora", "rsLoRA", use_rslora=True),
    _lora("dora", "DoRA", use_dora=True),
    _lora("pissa", "PiSSA", init_lora_weights="pissa"),
    Entry("vera", "VeRA", 1e-2, "vera"),
    Entry("head", "head only", 1e-2, None),
    Entry("full", "full fine-tuning", 5e-5, None),
)
"""PEFT's methods, and what is no adapter: the encoder frozen with a head on it, and everything trained."""


def entries() -> dict[str, Entry]:
    """Every method by its name in a recipe, isotune's first."""
    found = []
    for name, config in METHODS.items():
        about = (config.usual_learning_rate, name)
        size = (config.size_names, config.size_step)
        named = [(name, config.title or name.upper(), {}), *((own, *preset) for own, preset in config.presets.items())]
        scaled = config.scaled_learning_rate
        found += [Entry(own, title, *about, fixed, *size, scaled) for own, title, fixed in named]
    return {entry.name: entry for entry in (*found, *_OTHERS)}


def entry(name: str) -> Entry:
    """The method of a name; one that is not known, as in the record of another release, is its name in capitals."""
    return entries().get(name) or Entry(name, name.upper(), 1e-3, None, {}, {"r": "r"})


def is_plain(name: str) -> bool:
    """Whether a method is no adapter: a head alone, or full fine-tuning."""
    known = entries().get(name)
    return known is not None and known.base is None
