"""What has been measured, on disk as soon as it is there, and the time that is left."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import isotune
from isotune.experiments.files import read_object, write_json

Note = Callable[..., None]
"""Takes figures by name and writes them to the piece that runs."""

UNFINISHED = object()
"""What a piece returns that another run is to go on with."""


def environment(dry: bool) -> dict[str, Any]:
    """What a figure depends on: the card, the versions, and the sources of isotune by their digest."""
    digest, root = hashlib.blake2b(digest_size=6), Path(isotune.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {
        "card": "none: a dry run of tiny sizes on the CPU" if dry else torch.cuda.get_device_name(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "isotune": f"{isotune.__version__}, sources {digest.hexdigest()}",
    }


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


class Clock:
    """The minutes given, counted from now.

    Args:
        minutes: how many.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


class Journal:
    """The results, `{"pieces": {name: {"environment", "complete", "seconds", "errors", figures...}}}`.

    Args:
        path: of the JSON file; figures that it holds are kept.
        about: the environment of this run.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.results: dict[str, Any]
        self.read()

    def read(self) -> None:
        """Take what the file holds."""
        self.results = read_object(self.path) if self.path.exists() else {"pieces": {}}

    def holds(self, name: str) -> bool:
        """Whether a piece was measured to its end in this very environment."""
        found = self.results["pieces"].get(name, {})
        return found.get("environment") == self.about and found.get("complete", False)

    def failed(self, name: str) -> bool:
        """Whether a piece was tried in this environment and came to no end."""
        found = self.results["pieces"].get(name, {})
        return found.get("environment") == self.about and bool(found["errors"]) and not found["complete"]

    def reopen(self, name: str) -> None:
        """Let a piece be measured again, since the device was lost in it."""
        self.results["pieces"][name]["complete"] = False
        write_json(self.path, self.results)

    def seconds(self, name: str) -> float | None:
        """How long a piece took the last time that it came to its end, also in another environment."""
        found = self.results["pieces"].get(name, {})
        return float(found["seconds"]) if found.get("complete") else None

    def run(self, name: str, measure: Callable[[Note], object]) -> dict[str, Any]:
        """Carry out a piece; what it notes is written at once, and an error of the whole piece under its name.

        A piece is complete when it came to its end, with variants that failed, too: their errors are figures.
        """
        began = time.monotonic()
        piece: dict[str, Any] = {"environment": self.about, "complete": False, "errors": {}}
        before = self.results["pieces"].get(name)

        def note(**figures: Any) -> None:
            for key, value in figures.items():
                piece[key] = {**piece[key], **value} if key == "errors" else value
            piece["seconds"] = round(time.monotonic() - began, 1)
            self.results["pieces"][name] = piece
            write_json(self.path, self.results)

        try:
            note(complete=measure(note) is not UNFINISHED)
        except KeyboardInterrupt:
            # What an earlier run has measured to its end is worth more than a part.
            if before is not None and before.get("complete"):
                self.results["pieces"][name] = before
                write_json(self.path, self.results)
            raise
        except Exception as error:
            note(errors={name: said(error)})
        return piece
