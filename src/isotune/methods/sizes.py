"""Sizes that follow from the model: how a configuration asks for them, and what contradicts that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from isotune.methods.checks import require, shown, whole_number


class ChosenSize:
    """What all configurations know of sizes that are chosen when they meet a model."""

    size_names: ClassVar[Mapping[str, str]] = {}
    """Options that set the adapter's size -> their letters in papers; a comparison at equal size sets the first."""
    size_pattern: ClassVar[str] = ""
    """The option for the sizes chosen for modules; empty if there is no measure to choose them by."""
    asking: ClassVar[tuple[str, ...]] = ("rank_budget", "rank_energy")
    """Options that ask for a choice; None once it has been made, so that the sizes are then plain numbers."""
    fits_by_shape: ClassVar[bool] = False
    """Whether `fit` reads only how many singular values there are, so that it is given them without values."""
    sized: bool = True
    """False while sizes are being chosen; layers then wait for their adapters."""

    given: frozenset[str] = frozenset()
    """The options given at construction, so that a size equal to its default is not taken for the default."""

    @property
    def chooses(self) -> bool:
        """Whether anything is chosen when the configuration meets a model."""
        return any(getattr(self, name, None) is not None for name in self.asking)

    @property
    def chooses_sizes(self) -> bool:
        """Whether sizes are chosen for the model: the configuration has `rank_budget` or `rank_energy`."""
        return any(getattr(self, name, None) is not None for name in ("rank_budget", "rank_energy"))

    @property
    def by_activations(self) -> bool:
        """Whether they are chosen by the energy of activations, which needs data."""
        return getattr(self, "rank_measure", None) == "activations"

    def check_sized(self) -> None:
        """Refuse to store sizes that have not been chosen yet.

        Raises:
            ValueError: the configuration has not met a model.
        """
        if self.chooses:
            raise ValueError(
                f"The sizes of this {type(self).__name__} are chosen for a model, and it has not met one yet. Save the "
                "model that get_peft_model makes of it."
            )


def check_budget(config: Any) -> None:
    """Refuse a `rank_budget` with a method without sizes by module, or beside a size, and convert it to a number.

    Raises:
        ValueError: says what to do instead.
    """
    budget, kind = config.rank_budget, type(config).__name__
    if budget is None:
        return
    if not config.size_pattern:
        how = f"set {' and '.join(config.size_names)} yourself, " if config.size_names else ""
        raise ValueError(
            f"rank_budget={shown(budget)} has no meaning with {kind}, whose size by layer nothing can choose; "
            f"{how}compare at equal size with isotune compare --match-params, or choose another method, such as "
            "PSOFT or OFT."
        )
    config.rank_budget = whole_number("rank_budget", budget)
    sizes = (next(iter(config.size_names)), config.size_pattern, "r", "boft_block_num")
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name in sizes and option.name in config.given and value not in ("auto", None, 0, {}):
            left_out = (
                'set r="auto"' if option.name == "r" and config.size_pattern == "rank_pattern" else "leave it out"
            )
            raise ValueError(
                f"{option.name}={shown(value)} and rank_budget={shown(budget)} are both given, and either decides the "
                f"sizes; {left_out}, or leave rank_budget out."
            )


def check_choice(config: Any, alpha: float | None) -> None:
    """Refuse options that contradict ranks which are chosen for the model.

    Raises:
        ValueError: says what to do instead.
    """
    share = config.rank_energy
    if not config.size_pattern:
        raise ValueError(
            f"r={shown(config.r)} with rank_energy={share} has no meaning with {type(config).__name__}, whose rank "
            "is not one of a weight's principal subspace; give r as a number."
        )
    if share is not None:
        require(0.0 < share <= 1.0, "rank_energy", share, "it must be in (0, 1]")
        if config.rank_budget is not None:
            raise ValueError(
                f"rank_energy={share} and rank_budget={config.rank_budget} are both given; set one of them to None."
            )
        if ("r" in config.given and config.r != "auto") or config.rank_pattern:
            raise ValueError(
                f"rank_energy={share} decides the ranks, but r={config.r} with rank_pattern="
                f'{shown(config.rank_pattern)} is given too; set r="auto" and leave rank_pattern out, or leave '
                "rank_energy out."
            )
    if alpha is not None or config.alpha_pattern:
        raise ValueError(
            f"{config.alpha_option}={alpha} with alpha_pattern={shown(config.alpha_pattern)} is divided by the rank, "
            "so that ranks which are chosen would give every layer another scale. Leave both out, which is a scale of "
            "1, or give the ranks."
        )
