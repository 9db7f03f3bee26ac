"""How scores are written: shares in percent, differences of shares in points, and all else as numbers."""

from __future__ import annotations


def is_share(metric: str) -> bool:
    """Whether scores of a metric are parts of a whole."""
    return "accuracy" in metric


def plain(metric: str, value: float, sign: str = "") -> str:
    """A score, an error of one or a difference of two without a unit; with `sign` "+" it has one in any case."""
    return f"{100 * value:{sign}.1f}" if is_share(metric) else f"{value:{sign}.3f}"


def score(metric: str, value: float | None, error: float | None = None) -> str:
    """A score with its standard error where there is one, such as 83.9 ± 0.1 %; a dash for none."""
    if value is None:
        return "–"
    parts = (plain(metric, value), spread_of(metric, error), "%" if is_share(metric) else "")
    return " ".join(part for part in parts if part)


def spread_of(metric: str, error: float | None) -> str:
    """A standard error to stand behind a score, empty for none."""
    return "" if error is None else f"± {plain(metric, error)}"


def difference(metric: str, value: float, sign: str = "+") -> str:
    """A difference of two scores, such as +5.0 points."""
    number = plain(metric, value, sign)
    unit = " point" if number.lstrip("+-") == "1.0" else " points"
    return number + unit if is_share(metric) else number
