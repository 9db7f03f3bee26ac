"""The plots of a comparison as plotly figures, in colours that the page fills in for light and dark."""

from __future__ import annotations

import dataclasses

from isotune.report.figures.ablations import sizes, vectors
from isotune.report.figures.costs import costs
from isotune.report.figures.curves import curves, rates
from isotune.report.figures.forgetting import forgetting
from isotune.report.figures.geometry import geometry
from isotune.report.figures.looks import PALETTES, SYMBOLS, Figure, Looks, Section
from isotune.report.figures.quality import seeds
from isotune.report.results import Comparison

__all__ = ["PALETTES", "SYMBOLS", "Figure", "Looks", "Section", "sections"]

_MAKERS = (seeds, costs, forgetting, curves, rates, sizes, vectors, geometry)


def sections(comparison: Comparison, looks: Looks) -> list[Section]:
    """Every question that a comparison's records have an answer to, in the order of the page."""
    found = [section for maker in _MAKERS if (section := maker(comparison, looks)) is not None]
    return [dataclasses.replace(section, figures=_filled(section.figures)) for section in found]


def _filled(figures: list[Figure]) -> list[Figure]:
    """The last of an odd number of figures of half a row takes the whole of it."""
    halves = [i for i, figure in enumerate(figures) if figure.width == "half"]
    alone = halves[-1] if len(halves) % 2 else None
    return [dataclasses.replace(f, width="wide") if i == alone else f for i, f in enumerate(figures)]
