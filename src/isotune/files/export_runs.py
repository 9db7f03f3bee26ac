"""LoRA folders of all checkpoints in a directory, with one load of the base model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from isotune.files.adapter import CONFIG_FILE, named_base, read_config
from isotune.files.export_lora import LORA_REPORT, LoraExport, export_lora, origin_of
from isotune.subspace.lowrank import check_truncation


@dataclass
class RunsExport:
    """What became of the adapters of a directory, each by its path within it."""

    written: dict[str, LoraExport] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """Exported before, from the same file with the same options."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why."""


def adapter_folders(directory: str | os.PathLike[str]) -> list[Path]:
    """The paths, anywhere below a directory, of the folders that hold an adapter, checkpoint-2 before checkpoint-10.

    Raises:
        ValueError: there is no such directory, or no adapter in it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give an adapter's folder, or one that holds several.")
    inside = [file.parent.relative_to(root) for file in root.rglob(CONFIG_FILE)]
    found = [path for path in inside if not any(part.startswith(".") for part in path.parts)]  # no half-written ones
    if not found:
        raise ValueError(f"Neither {root} nor a folder in it has an {CONFIG_FILE}, so there is no adapter.")
    return sorted(found, key=_natural)


def only_adapter(directory: str | os.PathLike[str]) -> str:
    """The folder of the one adapter that a directory, such as a finished run's, is or holds at any depth.

    Raises:
        ValueError: there is no such directory, or no adapter or several in it.
    """
    found = adapter_folders(directory)
    if Path() in found:  # whatever checkpoints are in it
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
    is skipped, so an interrupted export goes on where it was; one that fails is reported, and the others are written.

    `rank`, `energy`, `uniform_rank` and `trust_remote_code` are as for `export_lora`.

    Args:
        directory: holds adapter folders at any depth, such as the checkpoints of a training.
        out: where to write; made if it is not there.
        base: the base model, or its name; by default what each adapter's config names.

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
    with tqdm(total=sum(map(len, pending.values())), desc="exporting", unit="adapter") as bar:
        for folders in pending.values():
            model: nn.Module | None = None
            for folder in folders:
                try:
                    model = model or named_base(root / folder, base, trust_remote_code=trust_remote_code)
                    report = export_lora(root / folder, target / folder, base=model, **options)
                    result.written[folder.as_posix()] = report
                except ValueError as error:
                    result.failed[folder.as_posix()] = str(error)
                bar.update()
    return result


def _natural(path: Path) -> list[int | str]:
    """Numbers in a name count as numbers: text and digits alternate, so like is compared with like."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.as_posix())]


def _base_of(folder: Path) -> str:
    """What decides which base model is loaded and how, as a key."""
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
            f"{exported} is there already, and not as this adapter and these options give it; remove it, or choose "
            "another place to write."
        )
    return True
