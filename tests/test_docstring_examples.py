"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import isotune

PACKAGES = ("algebra", "subspace", "methods", "files", "tuner", "tools", "internals", "hosts", "diagnostics")
MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages([f"{isotune.__path__[0]}/{package}"], f"isotune.{package}.")
    if not module.name.endswith("_kernels") or importlib.util.find_spec("triton")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name)).failed


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test.name for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert {"isotune.subspace.solvers.principal_subspace", "isotune.subspace.pinning.pin"} <= set(found)


def test_the_method_of_the_design_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "design.md"
    module = ModuleType("stretch")
    monkeypatch.setitem(sys.modules, "stretch", module)
    exec(compile(page.read_text().split("```python\n")[1].split("```")[0], page, "exec"), vars(module))
    operator = module.StretchConfig(r=4).subspace_operator(4)
    assert torch.equal(operator.matrix(), torch.eye(4))
    operator.randomize_parameters()
    assert torch.allclose(operator.matrix(), torch.diag(1 + operator.stretch))
