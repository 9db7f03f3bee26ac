"""Settings of every test run, and the tiny random models that most tests adapt.

Nothing heavy is imported at the top: under pytest-xdist the process that hands out the tests loads this file first, and
runs none of them.
"""

from __future__ import annotations

import gc
import itertools
import os

# Before anything imports transformers or isotune: no network, and no subspaces of an earlier run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ISOTUNE_CACHE"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TQDM_DISABLE", "1")

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

PRODUCT = 30
"""Cases of one test of which all run; of more a part in which every two values of different parameters meet."""


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run: the profiles of hypothesis, one thread, and isotune's own warnings as errors."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch
    from hypothesis import settings

    from helpers import QUICK

    settings.register_profile("quick", max_examples=5, deadline=None)
    settings.register_profile("ci", max_examples=40, deadline=None)
    settings.load_profile("quick" if QUICK else "ci")
    torch.set_num_threads(1)  # tiny matrices gain nothing from more, and several runs may share the machine
    config.addinivalue_line("filterwarnings", "error::isotune.errors.IsotuneWarning")


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every later search for garbage, which would take longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test begins with the same random numbers and the same default dtype."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=["opt", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """The architectures on which every user path runs."""
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Build a tiny random model of a family; equal arguments give equal weights."""

    from helpers import FAMILIES

    def make(family: str, **options: Any) -> nn.Module:
        return FAMILIES[family](**options)

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A word-level tokenizer built here, without any download."""
    from helpers import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the saved tiny base model and its tokenizer, by family."""
    from helpers import FAMILIES, make_tokenizer

    folders = {}
    for family in ("opt", "llama"):
        folders[family] = tmp_path_factory.mktemp(f"base-{family}")
        FAMILIES[family]().save_pretrained(folders[family])
        make_tokenizer().save_pretrained(folders[family])
    return folders


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `matrix` what a covering part leaves out of the products of parameters, and leave out what is too much.

    In a module marked `covered(name=(values, …), …)` the parameters named there keep these values alone, and of the
    product of the rest a part remains in which every two values of different parameters meet; values of one mechanism
    (`helpers.ALIKE`) count as one there but for one case of each. The whole product, with all values, runs beside it up
    to PRODUCT cases; of a larger one such a part of all values, unless ISOTUNE_TESTS=product asks for everything. In a
    quick run all tests are covered so, and of values of one mechanism one is enough.
    """
    from helpers import ALIKE, QUICK

    items[:] = [item for item in items if not rotates_an_embedding(item)]
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if hasattr(item, "callspec") and (QUICK or item.get_closest_marker("covered")):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = set[pytest.Item]()
    for cases in tests.values():
        marker = cases[0].get_closest_marker("covered")
        few = marker.kwargs.items() if marker else ()
        kept = [
            item for item in cases if all(item.callspec.params.get(name, values[0]) in values for name, values in few)
        ]
        quick = covering(kept, ALIKE)
        for item in set(cases) - set(quick):
            item.add_marker(pytest.mark.matrix)
        if marker and len(cases) > PRODUCT and os.environ.get("ISOTUNE_TESTS") != "product":
            left_out |= set(cases) - set(covering(cases, ALIKE, quick))
    items[:] = [item for item in items if item not in left_out]


def rotates_an_embedding(item: pytest.Item) -> bool:
    """Whether a case asks for a rotation of the outputs of an embedding, which is refused (tests/adapter)."""
    values = [str(value) for value in item.callspec.params.values()] if hasattr(item, "callspec") else []
    return any(value.endswith("-output") for value in values) and any("embedding" in value for value in values)


def covering(
    items: Sequence[pytest.Function], alike: Mapping[str, str], chosen: Sequence[pytest.Function] = ()
) -> list[pytest.Function]:
    """A few cases of one test in which each two values that meet in any of them meet; in a quick run each occurs.

    Args:
        items: the cases.
        alike: values -> the value for which they may stand in a pair (in a quick run: at all); by itself each occurs.
        chosen: those of the cases that are taken already.
    """
    from helpers import QUICK

    numbers: dict[Hashable, int] = {}
    pairs: dict[pytest.Function, int] = {}  # sets as bits, since there are thousands of cases
    for item in items:
        own = sorted(item.callspec.params.items())
        values = [(name, repr(alike.get(one, one) if isinstance(one, str) else one)) for name, one in own]
        each = values if QUICK else [(name, repr(value)) for name, value in own]
        met = each if QUICK else [*itertools.combinations(values, 2), *each]
        pairs[item] = sum(1 << numbers.setdefault(pair, len(numbers)) for pair in met)
    missing, found = (1 << len(numbers)) - 1, list(chosen)
    for item in found:
        missing &= ~pairs.pop(item)
    while missing:
        best = max(pairs, key=lambda item: (pairs[item] & missing).bit_count())  # of equal ones the first
        missing &= ~pairs.pop(best)
        found.append(best)
    return found
