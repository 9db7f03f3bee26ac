"""Settings of every test run, and the tiny random models that most tests adapt."""

from __future__ import annotations

import os

# Before anything imports transformers or isotune: no network, and no subspaces of an earlier run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ISOTUNE_CACHE"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TQDM_DISABLE", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isotune  # noqa: F401  registers the methods with PEFT
from helpers import FAMILIES, make_tokenizer

torch.set_num_threads(1)  # tiny matrices gain nothing from more, and several runs may share the machine


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test begins with the same random numbers and the same default dtype."""
    torch.manual_seed(0)


@pytest.fixture(params=["opt", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """The architectures on which every user path runs."""
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Build a tiny random model of a family; equal arguments give equal weights."""

    def make(family: str, **options: Any) -> nn.Module:
        return FAMILIES[family](**options)

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A word-level tokenizer built here, without any download."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the saved tiny base model and its tokenizer, by family."""
    folders = {}
    for family in ("opt", "llama"):
        folders[family] = tmp_path_factory.mktemp(f"base-{family}")
        FAMILIES[family]().save_pretrained(folders[family])
        make_tokenizer().save_pretrained(folders[family])
    return folders
