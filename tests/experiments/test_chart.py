"""The picture of a training: its axis, and colours that stand out from any ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from isotune.experiments.chart import INK, OWN, draw

image = pytest.importorskip("matplotlib.image")

ROWS: list[dict[str, Any]] = [
    {"title": "head alone", "score": "79.5 %", "mean": 0.795, "trainable_parameters": 7_700, "interval": (0.76, 0.827)},
    {
        "title": "PSOFT r=46",
        "score": "81.6 %",
        "mean": 0.816,
        "trainable_parameters": 48_272,
        "interval": (0.782, 0.846),
    },
]


def axes_of(metric: str, rows: list[dict[str, Any]], path: Path, **data: Any) -> Any:
    """What was drawn, as matplotlib holds it."""
    from matplotlib.figure import Figure

    made: list[Figure] = []
    original = Figure.subplots
    with mock.patch.object(Figure, "subplots", lambda self: made.append(self) or original(self)):
        draw(metric, data, rows, path)
    (axes,) = made[0].axes
    return axes


def test_the_axis_shows_the_gain_beside_its_intervals(tmp_path: Path) -> None:
    axes = axes_of("accuracy", ROWS, tmp_path / "new" / "chart.png", test=566, majority_accuracy=0.186)
    low, high = axes.get_xlim()
    assert 0.74 < low < 0.76 < 0.846 < high < 0.87
    bars = [tuple(line.get_xdata()) for line in axes.lines[::2]]
    assert bars == [row["interval"] for row in ROWS]
    assert [line.get_color() for line in axes.lines[::2]] == [INK, OWN]
    assert axes.get_xlabel() == (
        "test accuracy with its 95% interval over 566 test examples\nalways the most frequent class: 18.6 %"
    )
    assert {"78 %", "80 %", "82 %"} <= {label.get_text() for label in axes.get_xticklabels()}
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "PSOFT r=46\n48,272 trainable parameters"


def test_errors_over_seeds_stand_in_for_intervals(tmp_path: Path) -> None:
    rows = [{"title": "PSOFT", "score": "1.200", "mean": 1.2, "standard_error": 0.05, "trainable_parameters": None}]
    axes = axes_of("loss", rows, tmp_path / "chart.png")
    assert tuple(axes.lines[0].get_xdata()) == pytest.approx((1.15, 1.25))
    assert axes.get_xlabel() == "test loss with one standard error over the seeds"
    assert axes_of("loss", [{**rows[0], "standard_error": None}], tmp_path / "chart.png").get_xlabel() == "test loss"


def test_it_can_be_read_on_white_and_on_black(tmp_path: Path) -> None:
    draw("accuracy", {}, ROWS, tmp_path / "chart.png")
    picture = image.imread(tmp_path / "chart.png")
    assert picture.shape[1] == 1280
    assert picture[0, 0, 3] == 0  # no ground
    # WCAG asks for a contrast of 3 for marks and for text of this size.
    for colour in (INK, OWN):
        part = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
        assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) > 3.9
