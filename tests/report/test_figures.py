"""The plots: valid for plotly, legible in both colour schemes, and of the numbers that were read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from comparisons import METHODS, ablation_methods, write_comparison
from isotune.report.figures import PALETTES, Figure, Looks, Section, sections
from isotune.report.results import Comparison, read

graph_objects = pytest.importorskip("plotly.graph_objects")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return read(write_comparison(tmp_path_factory.mktemp("compare") / "demo"))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return read(write_comparison(tmp_path_factory.mktemp("compare") / "ranks", methods=ablation_methods()))


def made(comparison: Comparison) -> dict[str, Section]:
    return {section.key: section for section in sections(comparison, Looks([comparison]))}


def coloured(value: Any, scheme: str) -> Any:
    """As the page's script fills colours in."""
    if isinstance(value, str) and value.startswith("@"):
        palette: Any = PALETTES[scheme]
        return palette["series"][int(value[1:])] if value[1:].isdigit() else palette[value[1:]]
    if isinstance(value, dict):
        return {key: coloured(one, scheme) for key, one in value.items()}
    return [coloured(one, scheme) for one in value] if isinstance(value, list) else value


def colours_of(spec: Any) -> Iterator[str]:
    """Every colour that a figure leaves to the page, as "@ink"."""
    if isinstance(spec, str) and spec.startswith("@"):
        yield spec
    elif isinstance(spec, Mapping):
        for value in spec.values():
            yield from colours_of(value)
    elif isinstance(spec, (list, tuple)):
        for value in spec:
            yield from colours_of(value)


def figure(section: Section, key: str) -> Figure:
    return next(figure for figure in section.figures if figure.key == key)


@pytest.mark.parametrize("name", ["comparison", "ablation"])
def test_plotly_accepts_every_figure(name: str, request: pytest.FixtureRequest) -> None:
    found = made(request.getfixturevalue(name))
    always = {"quality", "costs", "forgetting", "curves", "rates", "vectors", "geometry"}
    assert set(found) == always | ({"ranks"} if name == "ablation" else set())
    for section in found.values():
        for one in section.figures:
            assert one.alt.endswith(".")
            assert one.title
            assert len(list(colours_of(one.data))) + len(one.data) > 0
            # Raises for any property or value that plotly does not have.
            graph_objects.Figure(data=coloured(one.data, "dark"), layout=coloured(one.layout, "light"))
            json.dumps([one.data, one.layout], allow_nan=False)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", list(PALETTES))
def test_colours_have_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    palette: Any = PALETTES[scheme]

    def contrast(colour: str, ground: str) -> float:
        dark, light = sorted((luminance(colour), luminance(palette[ground])))
        return (light + 0.05) / (dark + 0.05)

    for ground in ("paper", "panel"):
        assert min(contrast(colour, ground) for colour in palette["series"]) >= 3
        assert min(contrast(palette[name], ground) for name in ("ink", "muted")) >= 4.5
    assert contrast(palette["series"][0], "paper") >= 4.5  # links


def test_methods_keep_their_looks_and_no_two_look_alike(comparison: Comparison, ablation: Comparison) -> None:
    looks = Looks([comparison, ablation])
    variants = {v.title: v for c in (comparison, ablation) for v in c.variants}
    assert len(variants) > 20
    assert len({(looks.colour(v), looks.symbol(v)) for v in variants.values()}) == len(variants)


def test_quality_shows_each_seed_with_its_interval(comparison: Comparison) -> None:
    data = figure(made(comparison)["quality"], "seeds").data
    for variant in comparison.variants:
        points, mean = (trace for trace in data if trace["name"] == variant.title)
        assert points["x"] == variant.scores
        low = [x - minus for x, minus in zip(points["x"], points["error_x"]["arrayminus"], strict=True)]
        assert low == pytest.approx([run.interval[0] for run in variant.runs if run.interval])
        assert mean["x"] == [variant.mean]
        assert mean["error_x"]["array"] == [variant.standard_error]


def test_costs_fill_what_is_on_the_front(comparison: Comparison) -> None:
    figures = {one.key: one for one in made(comparison)["costs"].figures}
    assert set(figures) == {"parameters", "memory", "kept", "time"}
    front, *points = figures["parameters"].data
    filled = {trace["name"] for trace in points if not trace["marker"]["symbol"].endswith("-open")}
    costs = {v.title: (v.average("trainable_parameters") or 0, v.mean or 0) for v in comparison.variants}
    assert {trace["name"] for trace in points} == set(costs)
    expected = {
        name
        for name, (cost, score) in costs.items()
        if not any((c <= cost and s >= score) and (c, s) != (cost, score) for c, s in costs.values())
    }
    assert filled == expected
    assert list(zip(front["x"], front["y"], strict=True)) == sorted(costs[name] for name in expected)
    labels = figures["parameters"].layout["meta"]["labels"]
    assert [label["method"] for label in labels if label["front"]] == sorted(expected, key=lambda name: costs[name])
    assert {label["method"]: (pytest.approx(10 ** label["x"]), label["y"]) for label in labels} == costs
    # What a head takes on features computed once says nothing of a training, and would fill the axis.
    for key in ("memory", "kept", "time"):
        assert {trace["name"] for trace in figures[key].data[1:]} == set(costs) - {"head only"}
        assert figures[key].caption.startswith("Not shown: head only (")
    lowest = min(v.average("kept_bytes") or 0 for v in comparison.variants if v.name != "head")
    assert figures["kept"].layout["xaxis"]["range"][0] > -lowest


@pytest.mark.parametrize(
    ("times", "texts"),
    [
        ((765, 788), ["810 s", "820 s", "830 s"]),
        ((200, 900), ["0 min", "5 min", "10 min", "15 min"]),
        ((0.28, 0.34), ["0.3 s", "0.32 s", "0.34 s", "0.36 s"]),
    ],
)
def test_ticks_of_close_times_differ(tmp_path: Path, times: tuple[float, float], texts: list[str]) -> None:
    known = zip(("psoft:r=46", "lora:r=8"), times, strict=True)
    folder = write_comparison(tmp_path, methods={label: {**METHODS[label], "seconds": time} for label, time in known})
    (time,) = [one for one in made(read(folder))["costs"].figures if one.key == "time"]
    assert time.layout["xaxis"]["ticktext"] == texts


def test_curves_are_over_the_share_of_training(tmp_path: Path) -> None:
    """However many steps a method takes."""
    folder = write_comparison(tmp_path, methods={label: METHODS[label] for label in ("head", "psoft:r=46", "lora:r=8")})
    for path in (folder / "runs").rglob("*.json"):
        record = json.loads(path.read_text())
        longer = 10 if record["label"] == "head" else 1
        steps = [{**point, "step": longer * point["step"], "validation_loss": 1.0} for point in record["curve"]]
        path.write_text(json.dumps({**record, "curve": steps}))
    section = made(read(folder))["curves"]
    assert "A training has 720 steps (head only 7,200)." in section.text
    for one in section.figures:
        assert [trace["x"] for trace in one.data] == [[i / 8 for i in range(1, 9)]] * 3
    first = section.figures[0].data[0]
    assert "step 900 of 7,200" in first["hovertemplate"][0]
    # Two of three plots share a row; the last has one for itself.
    assert [one.width for one in section.figures] == ["half", "half", "wide"]


def test_ranks_and_vectors_are_those_of_one_family(ablation: Comparison) -> None:
    found = made(ablation)
    (ranks,) = figure(found["ranks"], "sizes").data
    assert ranks["x"] == [1, 2, 4, 8, 16, 32, 64, 128]
    by_title = {v.title: v.mean for v in ablation.variants}
    assert ranks["y"] == [by_title[f"PSOFT r={r}"] for r in (1, 2, 4, 8, 16, 32, 64, 128)]
    vectors = figure(found["vectors"], "vectors")
    assert vectors.layout["xaxis"]["ticktext"] == ["none", "α", "β", "α and β", "free R"]
    means = [trace["y"][0] for trace in vectors.data[1::2]]
    titles = ("PSOFT r=32 no α no β", "PSOFT r=32 no β", "PSOFT r=32 no α", "PSOFT r=32", "PSOFT r=32 no α no β free R")
    assert means == [by_title.get(t, by_title.get("PSOFT r=32 free R no α no β")) for t in titles]


def test_heat_maps_are_of_a_strict_and_a_relaxed_method(comparison: Comparison) -> None:
    figures = [one for one in made(comparison)["geometry"].figures if one.key.startswith("map")]
    assert [one.title for one in figures] == [
        f"{name}: {what}"
        for name, change in (("PSOFT-SO r=46, strict", "nothing moved"), ("PSOFT r=46, relaxed", "after − before"))
        for what in ("before training", "after training", change)
    ]
    (said,) = figures[2].layout["annotations"]
    assert said["text"] == "strict:<br>nothing moved"
    assert "annotations" not in figures[5].layout
    for before, after, moved in (figures[:3], figures[3:]):
        for i in range(24):
            assert before.data[0]["z"][i][i] is None
            for j in range(i):
                b, a = before.data[0]["z"][i][j], after.data[0]["z"][i][j]
                assert before.data[0]["z"][j][i] == b
                assert moved.data[0]["z"][i][j] == pytest.approx(a - b)
        # The same colours mean the same angles.
        assert [before.data[0][key] for key in ("zmin", "zmax")] == [after.data[0][key] for key in ("zmin", "zmax")]


def test_what_no_run_recorded_is_said(comparison: Comparison, tmp_path: Path) -> None:
    folder = write_comparison(
        tmp_path, methods={"head": {"score": 0.5, "parameters": 0, "seconds": 9, "peak": 1, "kept": 1}}
    )
    for path in (folder / "runs").rglob("*.json"):
        record = json.loads(path.read_text())
        record.update(peak_memory_bytes=None, kept_bytes=None, curve=[])
        path.write_text(json.dumps(record))
    found = made(read(folder))
    assert set(found) == {"quality", "costs", "rates"}
    assert found["costs"].missing == "No run recorded its peak memory of training or its kept for backward."
