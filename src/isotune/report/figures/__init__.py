"""The plots of a comparison as plotly figures, in colours that the page fills in for light and dark."""

from __future__ import annotations

from isotune.report.figures.ablations import sizes, vectors
from isotune.report.figures.costs import costs
from isotune.report.figures.curves import curves, rates
from isotune.report.figures.geometry import geometry
from isotune.report.figures.looks import PALETTES, SYMBOLS, Figure, Looks, Section
from isotune.report.figures.quality import forgetting, seeds
from isotune.report.results import Comparison

__all__ = ["PALETTES", "SYMBOLS", "Figure", "Looks", "Section", "sections"]

_MAKERS = (seeds, costs, forgetting, curves, rates, sizes, vectors, geometry)


def sections(comparison: Comparison, looks: Looks) -> list[Section]:
    """Every question that a comparison's records have an answer to, in the order of the page."""
    return [section for maker in _MAKERS if (section := maker(comparison, looks)) is not None]
