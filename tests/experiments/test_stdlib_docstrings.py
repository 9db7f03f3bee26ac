"""The demo's task: read without importing, fixed, and without leaks between the splits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from isotune.experiments.stdlib_docstrings import build, docstrings, normalised, split_of


@pytest.fixture(scope="module")
def task() -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    return build()


EXPECTED = {
    "rain": "train",
    "wind": "train",
    "fog": "train",
    "snow": "validation",
    "ice": "test",
    "sand": "test",
    "rock": "validation",
}


def library(root: Path, **sources: str) -> Path:
    for name, source in sources.items():
        (root / f"{name}.py").write_text(source)
    return root


def functions(prefix: str, count: int) -> str:
    return "\n".join(f'def f{n}():\n    """{prefix} words number {chr(97 + n)}."""' for n in range(count))


@pytest.mark.slow
def test_splits_share_no_text_and_are_about_75_10_15(
    task: tuple[dict[str, list[tuple[str, str]]], list[str]],
) -> None:
    splits, names = task
    assert len(names) == 20
    assert names == sorted(names)
    keys = {split: {normalised(text) for text, _ in rows} for split, rows in splits.items()}
    for split, rows in splits.items():
        assert len(keys[split]) == len(rows)  # and none twice within a split
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    total = sum(map(len, splits.values()))
    assert total > 2000
    assert 0.7 < len(splits["train"]) / total < 0.8
    assert 0.12 < len(splits["test"]) / total < 0.18


@pytest.mark.slow
def test_no_text_names_a_class(task: tuple[dict[str, list[tuple[str, str]]], list[str]]) -> None:
    splits, names = task
    words = {word for rows in splits.values() for text, _ in rows for word in normalised(text).split()}
    assert not words & set(names)


def test_nothing_is_imported(tmp_path: Path) -> None:
    root = library(tmp_path, poison='raise SystemExit\ndef f():\n    """Never run this code."""')
    assert list(docstrings(root)) == [("poison", "Never run this code.")]
    assert "poison" not in sys.modules


def test_what_is_left_out(tmp_path: Path) -> None:
    shared = 'def f():\n    """Found in two modules."""\ndef g():\n    """too short"""\n'
    root = library(
        tmp_path,
        alpha=shared + functions("alpha likes green", 9),
        beta=shared + functions("beta wants blue", 9),
        _private=functions("hidden", 20),
        test=functions("tests", 20),
        broken="def (:",
    )
    (root / "alpha_more").mkdir()
    splits, names = build(root, classes=2)
    assert names == ["alpha", "beta"]
    texts = {text: label for rows in splits.values() for text, label in rows}
    assert len(texts) == 18
    assert texts["… likes green words number a."] == "alpha"


def test_texts_equal_once_masked_are_left_out(tmp_path: Path) -> None:
    root = library(tmp_path, alpha=functions("alpha likes", 9), beta=functions("beta likes", 9))
    splits, _ = build(root, classes=2)
    assert sum(map(len, splits.values())) == 0


def test_the_split_of_a_text_is_fixed() -> None:
    assert [split_of(f"A text about {word}.") for word in ("rain", "wind", "snow", "fog", "hail")] == [
        split_of(f"a TEXT about,  {word} 42") for word in ("rain", "wind", "snow", "fog", "hail")
    ]
    # Written down, as a split that moves makes results incomparable.
    assert {word: split_of(word) for word in EXPECTED} == EXPECTED


def test_without_sources_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no docstrings to learn from"):
        build(tmp_path)
