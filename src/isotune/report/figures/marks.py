"""What figures are built of: points, means, lines, error bars, axes, and text that plotly takes for text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isotune.experiments.outcome import MethodResult
from isotune.experiments.scores import is_share
from isotune.report.figures.looks import Looks, Spec
from isotune.report.results import Comparison


def safe(text: str) -> str:
    """Text for plotly, which reads a few tags in it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def hover(*lines: str) -> str:
    """What is shown when the pointer is on a mark."""
    return f"{'<br>'.join(lines)}<extra></extra>"


def marks(variant: MethodResult, x: Sequence[Any], y: Sequence[Any], text: str | list[str], **more: Any) -> Spec:
    """A trace of a method, which is hidden with it."""
    named = {"name": safe(variant.title), "meta": variant.title, "type": "scatter", "mode": "markers"}
    return {**named, "x": list(x), "y": list(y), "hovertemplate": text, **more}


def circles(variant: MethodResult, x: Sequence[Any], y: Sequence[Any], text: str | list[str], colour: str) -> Spec:
    """A small open circle a seed."""
    marker = {"size": 7, "color": colour, "symbol": "circle-open", "line": {"width": 1.5}}
    return marks(variant, x, y, text, marker=marker)


def error(values: Sequence[float], thickness: float, width: float, colour: str | None = None, **more: Any) -> Spec:
    """Bars of `values` to both sides, or as `more` says."""
    bars = {"type": "data", "array": list(values), "thickness": thickness, "width": width}
    return {**bars, **({} if colour is None else {"color": colour}), **more}


def mean(
    comparison: Comparison, looks: Looks, variant: MethodResult, *, along: str, at: float, text: list[str]
) -> Spec:
    """A method's mean as a diamond with its standard error along the axis of scores, at a place on the other one."""
    colour = looks.colour(variant)
    first, *rest = text
    shown = f"mean {comparison.shown(variant.mean, variant.standard_error)}"
    places: dict[str, list[float | None]] = {along: [variant.mean], "y" if along == "x" else "x": [at]}
    return marks(
        variant,
        places["x"],
        places["y"],
        hover(first, shown, *rest),
        marker={"size": 11, "color": colour, "symbol": "diamond"},
        **{f"error_{along}": error([variant.standard_error or 0], 3, 5, colour)},
    )


def line(
    looks: Looks,
    variant: MethodResult,
    points: Sequence[tuple[float, float]],
    text: str | list[str],
    *,
    width: float,
    size: int,
    mode: str = "lines+markers",
) -> Spec:
    """A line through points, in the method's colour and with its symbol."""
    stroke = {"color": looks.colour(variant), "width": width, "dash": looks.dash(variant)}
    marker = {"size": size, "symbol": looks.symbol(variant)}
    x, y = [x for x, _ in points], [y for _, y in points]
    return marks(variant, x, y, text, mode=mode, line=stroke, marker=marker)


def with_chosen(trace: Spec, chosen: Sequence[bool]) -> Spec:
    """A line whose chosen points are larger and filled, and the others open."""
    symbol = trace["marker"]["symbol"]
    marker = {
        "size": [11 if one else 7 for one in chosen],
        "symbol": [symbol if one else f"{symbol}-open" for one in chosen],
        "color": trace["line"]["color"],
        "opacity": 1,
    }
    return {**trace, "marker": marker}


def axis(title: str = "", **more: Any) -> Spec:
    """An axis with a title."""
    return {**({"title": {"text": title}} if title else {}), **more}


def names(texts: Sequence[str], title: str = "") -> Spec:
    """An axis with a place for each text."""
    ticks = {"tickvals": list(range(len(texts))), "ticktext": [safe(text) for text in texts]}
    return axis(title, **ticks, range=[-0.6, len(texts) - 0.4], showgrid=False)


def marked(values: Sequence[float], texts: Sequence[str], ends: Sequence[float], **more: Any) -> Spec:
    """Ticks at values, and the range that an axis covers."""
    return {"tickvals": list(values), "ticktext": list(texts), "range": list(ends), **more}


_NARROW = 0.02


def scores(comparison: Comparison, title: str, values: Sequence[float] = ()) -> Spec:
    """An axis of scores; where `values` are almost alike, one that does not make their differences large."""
    found = axis(title, tickformat="~%" if is_share(comparison.metric) else ".3~f")
    if values and max(values) - min(values) < _NARROW:
        middle = (max(values) + min(values)) / 2
        found["range"] = [middle - _NARROW, middle + _NARROW]
    return found


def spread(count: int, width: float) -> list[float]:
    """`count` places around zero, `width` from the first to the last."""
    return [0.0] if count < 2 else [width * i / (count - 1) - width / 2 for i in range(count)]
