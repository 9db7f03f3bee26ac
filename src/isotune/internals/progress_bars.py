"""How tqdm shows progress, in its own bars and in those of every library that uses it."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from tqdm.std import tqdm

_TQDMS = {name: getattr(tqdm, name) for name in ("display", "clear", "close")}
_SECONDS = 10
"""Shortest time between two lines of one bar."""
_FORMAT = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def show_progress(how: Literal["bars", "lines", "none"]) -> None:
    """Choose how progress is shown from now on.

    Args:
        how: "bars" are redrawn in place, which would flood a file or pipe; "lines" are written at most once per percent
            and title, and at most every ten seconds; "none" shows nothing.
    """
    lines = {"display": _line if how == "lines" else _nothing, "clear": _nothing, "close": _close}
    for name, method in (_TQDMS if how == "bars" else lines).items():
        setattr(tqdm, name, method)


def last_title(log: Path) -> str:
    """The title of the bar that wrote the last line of progress into a file; empty where there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    found = re.findall(r"^(.+): \d+% ", text, re.MULTILINE)
    return found[-1] if found else ""


def _nothing(bar: Any, *_: Any, **__: Any) -> bool:
    return False


def _line(bar: Any, msg: str | None = None, pos: int | None = None, *, last: bool = False) -> bool:
    """Write a bar's state as a line if one is due, or at its end with `last`; `msg` is only set to clear a bar."""
    news = (int(100 * bar.n / bar.total) if bar.total else bar.n), bar.desc
    now = time.time()
    said, since = getattr(bar, "isotune_line", (None, getattr(bar, "start_t", now)))
    if msg is not None or news == said or (now - since < _SECONDS and not last):
        return False
    if said is not None and getattr(bar, "isotune_once", False):
        return False
    bar.isotune_line = news, now
    shown = {**bar.format_dict, "ncols": None, "bar_format": _FORMAT if bar.total else None}
    bar.fp.write(bar.format_meter(**shown) + "\n")
    bar.fp.flush()
    return True


def _close(bar: Any) -> None:
    """Close a bar, with a last line if the bar would stay on a terminal."""
    if not bar.disable:
        in_lines = getattr(tqdm, "display", None) is _line
        if in_lines and bar.leave is not False and time.time() >= bar.start_t + bar.delay:
            _line(bar, last=True)
        bar.leave = False
    _TQDMS["close"](bar)
