"""Timing variants against each other, interleaved in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from gpu_bench.journal import said
from gpu_bench.models import Settings

T = TypeVar("T")
FEWEST_ROUNDS = 2


def attempt(name: str, errors: dict[str, str], function: Callable[[], T]) -> T | None:
    """The result of a function, or None with its error noted under a name and its memory given back."""
    try:
        return function()
    except Exception as error:
        errors[name] = said(error)
    free()
    return None


def free() -> None:
    """Give back the memory of what is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_of(settings: Settings, function: Callable[[], Any]) -> float:
    """How long a function takes until the device has done its work."""
    return _timed(settings, function)[0]


def interleaved(
    settings: Settings, actions: Mapping[str, Callable[[], Any]], errors: dict[str, str], rounds: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Times of actions, round by round in another order each, as long as the seconds last but two rounds at least.

    Whatever else the machine does falls on all of them, and none always comes after the same one.

    Returns:
        Name -> for each round (time until the device was done, time until the host was), in seconds. An action that
        fails has its error noted and is left out.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    order, shuffled, end = list(actions), random.Random(0), time.monotonic() + seconds
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        shuffled.shuffle(order)
        for name in tuple(order):
            taken = attempt(name, errors, lambda action=actions[name]: _timed(settings, action))
            if taken is None:
                order.remove(name)
                del times[name]
            else:
                times[name].append(taken)
    return times


def _timed(settings: Settings, action: Callable[[], Any]) -> tuple[float, float]:
    settings.wait()
    began = time.perf_counter()
    action()
    host = time.perf_counter() - began
    settings.wait()
    return time.perf_counter() - began, host


def compared(times: Mapping[str, list[tuple[float, float]]], reference: str, per: int = 1) -> dict[str, dict[str, Any]]:
    """Medians over the rounds: ms, the host's own ms, and the ratio to the reference of the same round.

    Args:
        times: as of `interleaved`.
        reference: a name in it; without it there are no ratios.
        per: milliseconds are of this many parts, such as tokens.
    """
    found = {}
    beside = times.get(reference)
    for name, rounds in times.items():
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(rounds, beside, strict=True)) if beside else None
        found[name] = {
            "ratio": None if ratio is None else round(ratio, 4),
            "ms": round(1e3 / per * statistics.median(total for total, _ in rounds), 4),
            "host_ms": round(1e3 / per * statistics.median(host for _, host in rounds), 4),
            "rounds": len(rounds),
        }
    return found
