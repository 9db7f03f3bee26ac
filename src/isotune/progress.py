"""Progress bars of the library's own long work, by one rule of when they are shown."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

_DELAY_SECONDS = 3.0


def bar(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    leave: bool = True,
    shown: bool | None = None,
) -> Any:
    """A bar of tqdm over items, or to be updated by hand; of work that takes less than three seconds nothing is seen.

    Args:
        items: what is gone through; None for a bar that is updated by hand.
        desc: what is done.
        unit: what each item is.
        total: how many there are, if that cannot be asked of `items`.
        leave: whether the bar stays when all is done.
        shown: True shows it at once, False never; None follows the variable TQDM_DISABLE of the environment.
    """
    # tqdm reads that variable only if nothing is passed, and then only once, when imported.
    off = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(
        items,
        desc=desc,
        unit=unit,
        total=total,
        leave=leave,
        delay=0.0 if shown else _DELAY_SECONDS,
        disable=shown is False or (shown is None and off),
    )
