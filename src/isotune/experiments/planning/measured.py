"""What was measured on an accelerator: the files in `measured/`, which `benchmarks/gpu_constants.py` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.experiments.files import read_object

FOLDER = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Measured:
    """Of one accelerator."""

    about: str
    """Card, versions, and what was run."""
    dtype: str
    """Of the weights and the computation."""
    utilization: dict[str, float]
    """Method -> share of the vendor's operations a second that its training steps reached, counted as a plan counts."""

    @staticmethod
    def on(accelerator: str) -> Measured | None:
        """What was measured on an accelerator by its name in a setting; None for nothing."""
        path = FOLDER / f"{accelerator}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = read_object(path)
        return Measured(**found)
