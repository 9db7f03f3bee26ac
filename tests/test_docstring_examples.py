"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

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
