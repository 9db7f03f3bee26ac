"""The mode of files that safetensors writes, which only their owner could read."""

from __future__ import annotations

import os
from pathlib import Path


def readable(*files: Path) -> None:
    """Give files the mode that any new file has here; safetensors 0.8 makes them 0600, whatever the umask.

    Args:
        files: those that are there; others are passed over, and so are those of another owner.
    """
    for file in files:
        if not file.is_file():
            continue
        # The umask can only be read by setting it, for all threads: a new file shows it.
        trial = file.with_name(f".{file.name}.{os.getpid()}.mode")
        try:
            trial.touch(exist_ok=False)
            file.chmod(trial.stat().st_mode)
        except OSError:
            continue
        finally:
            trial.unlink(missing_ok=True)
