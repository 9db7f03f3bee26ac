"""Reading what `isotune report` is given: folders of isotune, and results of PEFT's own benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isotune.experiments.records import RESULT
from isotune.report.peft_results import holds_results, read_results
from isotune.report.results import Comparison, read


def comparisons(paths: Sequence[Path]) -> list[Comparison]:
    """The comparisons in some folders, in their order; PEFT's results of all of them stand together, in one table.

    Args:
        paths: folders that `isotune compare` or `isotune train` wrote; folders of results of PEFT's benchmark, such
            files themselves, and files with the facts of many of them.

    Raises:
        ValueError: a folder has nothing to report, or a file is damaged; names it.
    """
    peft = [path for path in paths if not (path / RESULT).exists() and holds_results(path)]
    found: list[Comparison] = []
    for path in paths:
        if path not in peft:
            found.append(read(path))
        elif path == peft[0]:
            found += read_results(list(dict.fromkeys(peft)))
    return found
