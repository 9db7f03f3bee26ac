"""Every Python that is promised: what needs no torch under each that there is, annotations under the running one."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import isotune
from helpers import QUICK

SOURCE = Path(isotune.__file__).parent
CHECKS = Path(__file__).parent / "pythons" / "without_torch.py"
FOLDERS = [SOURCE.parent, *(Path(__file__).parents[1] / name for name in ("tests", "benchmarks", "examples"))]
FOLDERS = FOLDERS[: 1 if QUICK else None]
MINORS = (10, 11, 12, 13, 14)
"""Of Python 3: those that pyproject.toml promises and of which there is a release."""
PINNED = (10, 11, 12, 13)
"""Those that constraints.txt is made for."""


@functools.cache
def interpreter(minor: int) -> str | None:
    """A Python of this version: the running one, one on the path, or one of pyenv's."""
    if sys.version_info[:2] == (3, minor):
        return sys.executable
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python3.{minor}"), *sorted(root.glob(f"versions/3.{minor}.*/bin/python"))]
    ask = "import sys; print(sys.version_info.releaselevel, *sys.version_info[:2])"
    for candidate in filter(None, candidates):  # pyenv puts names on the path that start nothing
        answer = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False).stdout
        if answer.split() == ["final", "3", str(minor)]:
            return str(candidate)
    return None


def check(python: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """The checks that need nothing installed; -B leaves no compiled file in the tree."""
    command = [python, "-B", "-I", "-W", "error", str(CHECKS), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("minor", MINORS, ids=lambda minor: f"3.{minor}")
def test_what_needs_no_torch(minor: int) -> None:
    """The enumeration's extension, every file compiled with warnings as errors, names and annotations resolved."""
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    run = check(python, *(folder for folder in FOLDERS if folder.is_dir()))
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split()[-4]) >= len(list(SOURCE.rglob("*.py")))


@pytest.mark.parametrize("minor", PINNED, ids=lambda minor: f"3.{minor}")
def test_the_constraints_serve_it(minor: int) -> None:
    """One pin of every package that the project asks for, and one that the project allows."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    here = {
        "python_version": f"3.{minor}",
        "python_full_version": f"3.{minor}.9",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }

    def wanted(lines: list[str]) -> Iterator[Requirement]:
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate(here):
                yield requirement

    pins: dict[str, list[str]] = {}
    for pin in wanted((SOURCE.parents[1] / "constraints.txt").read_text().splitlines()):
        (version,) = [specifier.version for specifier in pin.specifier if specifier.operator == "=="]
        pins.setdefault(canonicalize_name(pin.name), []).append(version)
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "eval"}  # not in dev
    asked = [*project["dependencies"], *itertools.chain(*extras.values())]
    for requirement in wanted(asked):
        if requirement.name != "isotune":
            (version,) = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement
    assert {name for name, versions in pins.items() if len(versions) > 1} == set()


def test_the_promise_is_that_of_the_project() -> None:
    project = (SOURCE.parents[1] / "pyproject.toml").read_text()
    assert f'requires-python = ">=3.{MINORS[0]}"' in project
    assert f'target-version = "py3{MINORS[0]}"' in project
    assert f'python_version = "3.{MINORS[0]}"' in project
    assert sys.version_info[:2] >= (3, MINORS[0])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('PATTERN = "\\d"', "SyntaxError"),
        ("from typing import NoSuchName", "typing.NoSuchName does not exist"),
        ("from collections.abc import Nothing as List", "collections.abc.Nothing does not exist"),
        ("import no_such.standard_library", None),
        ("import enum\n\ndef f(x: int) -> int:\n    return enum.no_such_name", "enum.no_such_name does not exist"),
        ("import os.path as p\n\nx: p.NoSuchName", "NoSuchName"),
        ("def f(x: list[itn]) -> None: ...", "NameError"),
        ("def f(x: 'itn') -> None: ...", "NameError"),
        ("from torch import Tensor\n\ndef f(x: Tensor | None, *y: list[Tensor]) -> 'Tensor | int': ...", None),
        ("class A:\n    next: A | None = None", None),
    ],
)
def test_the_checks_see_faults(text: str, fault: str | None, tmp_path: Path) -> None:
    package = tmp_path / "isotune" / "internals"
    package.mkdir(parents=True)
    shutil.copy(SOURCE / "internals" / "enumeration.py", package)
    (tmp_path / "isotune" / "one.py").write_text(text + "\n")
    run = check(sys.executable, tmp_path)
    assert run.returncode == (fault is not None), run.stdout
    assert (fault or "2 modules") in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize("line", ["setattr(enumeration, name, member)", "enumeration._member_names_.append(name)"])
def test_the_checks_see_an_enumeration_that_lacks_something(line: str, tmp_path: Path) -> None:
    package = tmp_path / "isotune" / "internals"
    package.mkdir(parents=True)
    text = (SOURCE / "internals" / "enumeration.py").read_text()
    assert line in text
    (package / "enumeration.py").write_text(text.replace(line, "pass"))
    if "setattr" in line and sys.version_info < (3, 12):
        assert check(sys.executable, tmp_path).returncode == 0  # found by name, in the table
    else:
        assert check(sys.executable, tmp_path).returncode == 1


def modules() -> Iterator[str]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(("isotune", *(part for part in parts if part != "__init__")))


def for_type_checkers(module: ModuleType) -> dict[str, Any]:
    """What a module imports under TYPE_CHECKING alone, imported."""
    names: dict[str, Any] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            exec(ast.unparse(ast.Module(node.body, [])), vars(module).copy(), names)
    return names


def own(module: ModuleType) -> Iterator[Any]:
    """The functions and classes that a module defines, with the methods of these.

    Not those that `dataclass` makes: it copies the strings of a base class into another module.
    """
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        found = [value]
        if inspect.isclass(value):
            yield value
            found = [getattr(method, "__func__", getattr(method, "fget", method)) for method in vars(value).values()]
        yield from (f for f in found if inspect.isfunction(f) and f.__code__.co_filename == module.__file__)


def test_annotations_resolve() -> None:
    """`typing.get_type_hints` of everything, as documentation and command-line tools ask for it."""
    needed = {
        "algebra.block_kernels": "triton",
        "algebra.elimination_kernels": "triton",
        "experiments.tasks.causal": "trl",
        "experiments.tasks.chat": "trl",
        "experiments.tasks.commonsense": "trl",
        "experiments.tasks.conversations": "trl",
        "experiments.tasks.language": "trl",
        "experiments.tasks.math": "trl",
        "experiments.tasks.preference": "trl",
        "integrations.axolotl": "axolotl",
        "integrations.ms_swift": "swift",
    }
    failed: dict[str, str] = {}
    for name in modules():
        library = needed.get(name.removeprefix("isotune."))
        if name.endswith("__main__") or (library and importlib.util.find_spec(library) is None):
            continue  # runs the command, or cannot be imported here
        module = importlib.import_module(name)
        names = for_type_checkers(module)
        for value in own(module):
            try:
                typing.get_type_hints(value, localns=names)
            except Exception as error:
                failed[f"{name}.{value.__qualname__}"] = repr(error)
    assert not failed
