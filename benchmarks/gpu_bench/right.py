"""The tests on the GPU, `tests/gpu`, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_bench.journal import Note

LIMIT = 120
"""Seconds."""

_OUTCOME = re.compile(r"^(\S+?::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \((.*)\))?(?:\s+\[ *\d+%\])?$", re.M)


def outcomes(output: str) -> dict[str, object]:
    """What pytest's lines, `-vv`, say: how many passed, and the names of the others with reasons of those skipped.

    A test that failed and whose teardown failed, too, counts once.
    """
    found = [(name, result, reason or "") for name, result, reason in _OUTCOME.findall(output)]
    passed = [name for name, result, _ in found if result in ("PASSED", "XFAIL")]
    failed = dict.fromkeys(name for name, result, _ in found if result in ("FAILED", "ERROR", "XPASS"))
    skipped = {name: reason for name, result, reason in found if result == "SKIPPED"}
    return {"passed": len([name for name in passed if name not in failed]), "failed": list(failed), "skipped": skipped}


def run_tests(note: Note, folder: Path, limit: float = LIMIT) -> None:
    """Run the tests, and note what came of those that ended within the limit, in seconds.

    Raises:
        FileNotFoundError: there is no such folder.
        RuntimeError: pytest itself failed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of tests")
    root = Path(__file__).parents[2]
    # Wide, for the reasons of skipped tests to stay in their lines.
    paths = [str(root / "src"), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "COLUMNS": "2000", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-vv", "-rfE", "--tb=short", "--color=no"]
    call = [sys.executable, "-m", "pytest", *options, str(folder)]
    late, code = False, 0
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=root
    ) as child:
        try:
            output, _ = child.communicate(timeout=limit)
            code = child.returncode
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            late = True
    found = outcomes(output)
    if found["failed"] or late or code:
        found["output"] = output[-8000:]
    note(**found, within_limit=not late)
    # 1: tests failed; 5: there are none.
    if not late and code not in (0, 1):
        raise RuntimeError(
            f"pytest ended with code {code}: {output.strip().splitlines()[-1] if output.strip() else ''}"
        )
