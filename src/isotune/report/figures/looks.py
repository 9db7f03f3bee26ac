"""How figures look: colours of both schemes, the colour and symbol of each method, and what a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isotune.experiments.outcome import MethodResult
from isotune.report.results import Comparison

Spec = dict[str, Any]
"""A trace, an axis or a layout of plotly."""

PALETTES = {
    "light": {
        "paper": "#ffffff",
        "panel": "#ffffff",
        "ink": "#1b232d",
        "muted": "#5a6572",
        "grid": "#dfe4ea",
        "series": (
            *("#2f5fb3", "#b0510a", "#2b7a3d", "#c0323f", "#7a4bb0"),
            *("#0f7580", "#b4317f", "#716a12", "#56606d", "#7d4e33"),
        ),
    },
    "dark": {
        "paper": "#12161c",
        "panel": "#181d25",
        "ink": "#e6eaf0",
        "muted": "#a3adba",
        "grid": "#333c48",
        "series": (
            *("#7aa7f0", "#f0994d", "#6cc581", "#f2808a", "#b996ea"),
            *("#4fc3cc", "#ec86c4", "#c9c05a", "#a9b3c1", "#d3a183"),
        ),
    },
}
"""By colour scheme; a figure says "@ink" or "@0" where it means one of these."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Figure:
    """A plot, with a text in `alt` for readers who cannot see it."""

    key: str
    title: str
    caption: str
    alt: str
    data: list[Spec]
    layout: Spec
    height: int
    width: str = "wide"
    """Where there is room two of "half" or three of "third" stand side by side."""


@dataclass(frozen=True)
class Section:
    """The plots that answer one question."""

    key: str
    title: str
    text: str
    figures: list[Figure]
    missing: str = ""
    """What cannot be shown, and why."""
    named: bool = False
    """Whether the plots have the methods' names on an axis."""


class Looks:
    """The colour and symbol of every method of a page, the same in all of its plots."""

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        titles = dict.fromkeys(v.title for c in comparisons for v in c.variants)
        self.number = {title: number for number, title in enumerate(titles)}

    def colour(self, variant: MethodResult) -> str:
        """The number of the method's colour in a palette, such as "@3"."""
        return f"@{self.number[variant.title] % len(PALETTES['light']['series'])}"

    def symbol(self, variant: MethodResult) -> str:
        """A plotly symbol."""
        return SYMBOLS[self.number[variant.title] % len(SYMBOLS)]

    def dash(self, variant: MethodResult) -> str:
        """A plotly line style; differs where the colours repeat."""
        return _DASHES[self.number[variant.title] // len(PALETTES["light"]["series"]) % len(_DASHES)]
