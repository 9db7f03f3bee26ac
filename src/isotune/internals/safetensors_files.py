"""The mode of files written by safetensors, which only their owner could read."""

from __future__ import annotations

import os
from pathlib import Path


def readable(*files: Path) -> None:
    """Give files the usual mode of a new file here; safetensors 0.8 makes them 0600, whatever the umask.

    Args:
        files: the files; missing ones and those of another owner are skipped.
    """
    for file in files:
        if not file.is_file():
            continue
        # Reading the umask means setting it, for all threads; a new file shows it instead.
        trial = file.with_name(f".{file.name}.{os.getpid()}.mode")
        try:
            trial.touch(exist_ok=False)
            file.chmod(trial.stat().st_mode)
        except OSError:
            continue
        finally:
            trial.unlink(missing_ok=True)
