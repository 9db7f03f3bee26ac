"""Exporting all checkpoints in a directory as LoRA folders, loading the base model once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from isotune.files.adapter import CONFIG_FILE, named_base, read_config
from isotune.files.export_lora import LORA_REPORT, LoraExport, export_lora, origin_of
from isotune.progress import bar
from isotune.subspace.lowrank import check_truncation


@dataclass
class RunsExport:
    """The outcome for each adapter of a directory, by its path within the directory."""

    written: dict[str, LoraExport] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """Adapters exported before, from the same file with the same options."""
    failed: dict[str, str] = field(default_factory=dict)
    """Path -> reason."""


def adapter_folders(directory: str | os.PathLike[str]) -> list[Path]:
    """The paths of all adapter folders at any depth below a directory, checkpoint-2 before checkpoint-10.

    Raises:
        ValueError: there is no such directory, or no adapter in it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give an adapter's folder, or a folder that holds several.")
    inside = [file.parent.relative_to(root) for file in root.rglob(CONFIG_FILE)]
    found = [path for path in inside if not any(part.startswith(".") for part in path.parts)]  # none half-written
    if not found:
        raise ValueError(f"Neither {root} nor any folder below it has an {CONFIG_FILE}, so there is no adapter here.")
    return sorted(found, key=_natural)


def only_adapter(directory: str | os.PathLike[str]) -> str:
    """The only adapter folder at any depth below a directory, such as a finished run's; maybe the directory itself.

    Raises:
        ValueError: there is no such directory, or it holds no adapter or several.
    """
    found = adapter_folders(directory)
    if Path() in found:  # even if it also holds checkpoints
        return os.fspath(directory)
    if len(found) > 1:
        names = ", ".join(str(Path(directory) / path) for path in found)
        raise ValueError(f"{directory} holds {len(found)} adapters; give the folder of one: {names}.")
    return os.fspath(Path(directory) / found[0])


def export_lora_runs(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: nn.Module | str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    uniform_rank: bool = False,
    trust_remote_code: bool = False,
) -> RunsExport:
    """Write every adapter below a directory as a LoRA folder of the same name below `out`.

    Each base model is loaded once. An adapter that was exported before, from the same file and with the same options,
    is skipped, so an interrupted export can be continued; one that fails is reported, and the others are written.

    `rank`, `energy`, `uniform_rank` and `trust_remote_code` are as in `export_lora`.

    Args:
        directory: a directory with adapter folders at any depth, such as the checkpoints of a training run.
        out: the directory to write into; created if needed.
        base: the base model, or its name; by default the one that each adapter's configuration names.

    Raises:
        ValueError: there is no adapter at all, or the options are not allowed.
    """
    check_truncation(rank, energy)
    root, target, result = Path(directory), Path(out), RunsExport()
    options: dict[str, Any] = {"rank": rank, "energy": energy, "uniform_rank": uniform_rank}
    pending: dict[str, list[Path]] = {}
    for folder in adapter_folders(root):
        try:
            if _is_done(root / folder, target / folder, options):
                result.skipped.append(folder.as_posix())
            else:
                pending.setdefault(_base_of(root / folder), []).append(folder)
        except ValueError as error:
            result.failed[folder.as_posix()] = str(error)
    with bar(total=sum(map(len, pending.values())), desc="exporting", unit="adapter") as shown:
        for folders in pending.values():
            model: nn.Module | None = None
            for folder in folders:
                try:
                    model = model or named_base(root / folder, base, trust_remote_code=trust_remote_code)
                    report = export_lora(root / folder, target / folder, base=model, **options)
                    result.written[folder.as_posix()] = report
                except ValueError as error:
                    result.failed[folder.as_posix()] = str(error)
                shown.update()
    return result


def _natural(path: Path) -> list[int | str]:
    """Sort key that compares numbers in a name by value; text and digits alternate, so types always match."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.as_posix())]


def _base_of(folder: Path) -> str:
    """A key for the base model and the way it is loaded."""
    raw = read_config(folder)
    return json.dumps([raw.get(k) for k in ("base_model_name_or_path", "revision", "task_type", "auto_mapping")])


def _is_done(folder: Path, exported: Path, options: Mapping[str, Any]) -> bool:
    if not exported.exists():
        return False
    try:
        found = json.loads((exported / LORA_REPORT).read_text(encoding="utf-8")).get("origin")
    except (OSError, ValueError):
        found = None
    if found != origin_of(folder, options):
        raise ValueError(
            f"{exported} already exists, but from another adapter or other options; remove it, or choose another place "
            "to write."
        )
    return True
