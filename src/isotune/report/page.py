"""The report as one page that needs nothing else: no network, no server."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from isotune.experiments import paper, suites
from isotune.experiments.outcome import MethodResult
from isotune.report.columns import Cell, score_of, table_of
from isotune.report.figures import PALETTES, SYMBOLS, Looks, Section, sections
from isotune.report.finding import finding
from isotune.report.results import Comparison
from isotune.report.titles import page_title, recipe_names, summary, titles
from isotune.versions import install

_OUTLINES = {
    "circle": "M6 1.5a4.5 4.5 0 1 1 0 9a4.5 4.5 0 1 1 0-9z",
    "square": "M2 2h8v8H2z",
    "diamond": "M6 .8 11.2 6 6 11.2.8 6z",
    "triangle-up": "M6 1 11.2 10.4H.8z",
    "triangle-down": "M6 11 .8 1.6h10.4z",
    "cross": "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z",
    "star": "M6 .6 7.5 4.3 11.4 4.6 8.4 7.1 9.4 11 6 8.8 2.6 11 3.6 7.1.6 4.6 4.5 4.3z",
}
assert set(_OUTLINES) == set(SYMBOLS)


def render(comparisons: Sequence[Comparison]) -> str:
    """The page of one or several comparisons.

    Raises:
        ValueError: plotly or jinja2 is not installed.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: {install('report')}") from error
    from isotune import __version__  # its metadata are missing where the sources are run without an installation

    looks = Looks(comparisons)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    keys = _keys(comparisons)
    names = titles(comparisons)
    parts = [_part(c, key, name, looks) for c, key, name in zip(comparisons, keys, names, strict=True)]
    figures = {
        f"{part['key']}-plot-{figure.key}": {"data": figure.data, "layout": figure.layout}
        for part in parts
        for section, _ in part["sections"]
        for figure in section.figures
    }
    page: str = environment.from_string(_file("page.html")).render(
        title=page_title(comparisons),
        parts=parts,
        overview=_overview(comparisons, keys, recipe_names(comparisons)),
        palettes=PALETTES,
        css=_file("page.css"),
        script=_file("page.js"),
        plotly=get_plotlyjs(),
        figures=_embedded(figures),
        palettes_json=_embedded(PALETTES),
        version=__version__,
        paper_source=paper.source() if any(c.paper for c in comparisons) else None,
    )
    return page


def _file(name: str) -> str:
    return resources.files("isotune.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that may stand in a script element whatever text it holds."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _keys(comparisons: Sequence[Comparison]) -> list[str]:
    """A short name for each comparison's anchors."""
    keys: list[str] = []
    for comparison in comparisons:
        plain = re.sub(r"[^a-z0-9]+", "-", comparison.recipe.lower()).strip("-") or "comparison"
        names = [plain, *(f"{plain}-{number}" for number in range(2, len(comparisons) + 2))]
        keys.append(next(name for name in names if name not in keys))
    return keys


def _part(comparison: Comparison, key: str, name: str, looks: Looks) -> dict[str, Any]:
    """What the template shows of one comparison; the number of seeds stands beside the score, not in a column."""
    heads, rows = table_of(comparison)
    shown = [i for i, head in enumerate(heads) if head.kind not in ("score", "seeds")]
    return {
        "comparison": comparison,
        "key": key,
        "heading": name,
        "summary": summary(comparison),
        "finding": finding(comparison),
        "facts": _facts(comparison),
        "heads": [heads[0], *(heads[i] for i in shown)],
        "rows": [
            {**_swatch(variant, looks), "cells": [_with_seeds(variant, cells[0]), *(cells[i] for i in shown)]}
            for variant, cells in rows
        ],
        "near": any(comparison.near_best(variant) for variant in comparison.variants),
        "border": any(variant.rate_at_border for variant in comparison.variants),
        "legend": [_swatch(variant, looks) for variant in comparison.scored],
        "sections": [(section, _legend(section, comparison, looks)) for section in sections(comparison, looks)],
        "geometry": _geometry(comparison),
    }


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    splits = [(split, comparison.data.get(split)) for split in ("train", "validation", "test")]
    hardware: Mapping[str, Any] = next((run.hardware for run in comparison.runs if run.hardware), {})
    versions: Mapping[str, Any] = next((run.versions for run in comparison.runs if run.versions), {})
    machine = [str(hardware.get("accelerator") or ""), str(hardware.get("platform") or "")]
    if hardware.get("processors"):
        threads = f", threads a run: {hardware['threads']}" if hardware.get("threads") else ""
        machine.append(f"{hardware['processors']} processors{threads}")
    names = ("isotune", "isotune commit", "torch", "peft", "transformers", "python")
    failed = sum(run.failed is not None for run in comparison.runs)
    matched = comparison.match_params
    facts = [
        ("Task", comparison.recipe + (f" ({comparison.task})" if comparison.task else "")),
        ("Model", comparison.model),
        ("Data", ", ".join(f"{size:,} {split}" for split, size in splits if isinstance(size, int))),
        ("Seeds", ", ".join(map(str, comparison.seeds))),
        ("Runs", f"{len(comparison.runs) - failed} done, {failed} failed"),
        ("Adapters matched to", "" if matched is None else f"{matched:,.0f} parameters"),
        ("Machine", "; ".join(part for part in machine if part)),
        ("Versions", ", ".join(f"{name} {versions[name]}" for name in names if name in versions)),
    ]
    return [(name, value) for name, value in facts if value]


def _swatch(variant: MethodResult, looks: Looks) -> dict[str, Any]:
    """The name of a method with its mark in the plots."""
    colour, outline = looks.colour(variant).removeprefix("@"), _OUTLINES[looks.symbol(variant)]
    return {"title": variant.title, "colour": colour, "outline": outline}


def _legend(section: Section, comparison: Comparison, looks: Looks) -> list[dict[str, Any]]:
    """The methods that the plots of a section tell apart by colour and symbol alone."""
    if section.named:
        return []
    shown = {trace.get("meta") for figure in section.figures for trace in figure.data}
    return [_swatch(v, looks) for v in comparison.variants if v.title in shown]


def _with_seeds(variant: MethodResult, cell: Cell) -> Cell:
    number = len(variant.scores)
    if not number:
        return cell
    seeds = f"{number} seed{'s' if number > 1 else ''}"
    return dataclasses.replace(cell, small=f"{cell.small} · {seeds}".removeprefix(" · "))


def _geometry(comparison: Comparison) -> list[dict[str, str]]:
    """A row a method: how far it turned, and what it kept."""
    rows = []
    for variant in comparison.variants:
        geometry = variant.geometry
        if geometry is None:
            continue
        layers = geometry.layers
        turned = [row.rotation.largest for row in layers if row.rotation is not None]
        errors = [row.orthogonality_error for row in layers if row.orthogonality_error is not None]
        rows.append(
            {
                "title": variant.title,
                "kind": "strict" if geometry.strict else "relaxed",
                "weight": "principal" if geometry.subspaces else "whole",
                "turned": f"{max(turned):.1f}°" if turned else "–",
                "error": f"{max(errors):.0e}" if errors else "–",
                "angles": f"{max(row.angles_moved.largest for row in layers):.2g}°",
                "norms": f"{max(row.norms_moved.largest for row in layers):.2g}",
            }
        )
    return rows


def _overview(comparisons: Sequence[Comparison], keys: Sequence[str], names: Sequence[str]) -> dict[str, Any] | None:
    """Every method that several comparisons have, on each of these; None where there is none."""
    titles = [v.title for c in comparisons for v in c.ranked(c.variants)]
    shared = [title for title in dict.fromkeys(titles) if titles.count(title) > 1]
    named = zip(comparisons, keys, names, strict=True)
    tables = [(c, key, name, {v.title: v for v in c.variants if v.title in shared}) for c, key, name in named]
    shown = [table for table in tables if table[-1]]
    if not shown:
        return None
    rows: list[dict[str, Any]] = []
    for title in shared:
        found = [(c, variants.get(title)) for c, _, _, variants in shown]
        cells = [_with_seeds(variant, score_of(c, variant)) if variant else Cell("–") for c, variant in found]
        scores = {c.recipe: variant.mean for c, variant in found if variant and variant.mean is not None}
        rows.append({"title": title, "cells": cells, "means": _suite_means(scores)})
    means = list(dict.fromkeys(name for row in rows for name in row["means"]))
    for row in rows:
        own = row.pop("means")
        row["cells"] += [Cell(f"{100 * own[name]:.1f}", own[name]) if name in own else Cell("–") for name in means]
    heads = [{"title": name, "metric": c.metric_name, "key": key} for c, key, name, _ in shown]
    heads += [{"title": name, "metric": "mean × 100", "key": ""} for name in means]
    return {"heads": heads, "rows": rows}


def _suite_means(scores: Mapping[str, float]) -> dict[str, float]:
    """The means that the paper has of its suites, of those that are complete: glue, vtab natural, vtab, …"""
    found: dict[str, float] = {}
    for suite in dict.fromkeys(recipe.rpartition("/")[0] for recipe in scores):
        if suite in paper.MODELS:
            found |= {f"{suite} {name}": value for name, value in suites.means(suite, scores).items()}
    return found
