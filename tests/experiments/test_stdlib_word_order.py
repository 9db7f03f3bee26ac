"""The word-order task: balanced, the same on every machine, and without leaks between the splits."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from isotune.experiments.stdlib_docstrings import normalised, split_of
from isotune.experiments.stdlib_word_order import LABELS, SIZES, build, exchanged, sentences

Splits = dict[str, list[tuple[str, str]]]
NOUNS = ["lamp", "river", "stone", "table", "cloud", "garden", "window", "pencil", "bottle", "forest"]
VERBS = ["holds", "finds", "moves", "paints", "breaks", "lifts", "turns", "counts", "cleans", "hides"]


@pytest.fixture(scope="module")
def task() -> Splits:
    return build()


def library(root: Path, lines: list[str]) -> Path:
    """A library of one module, a docstring for each text."""
    (root / "alpha.py").write_text("\n".join(f'def f{i}():\n    """{line}"""' for i, line in enumerate(lines)))
    return root


def many() -> list[str]:
    return [f"The old {one} {verb} the new {other} again." for one in NOUNS for verb in VERBS for other in NOUNS[:3]]


@pytest.mark.slow
def test_the_library_gives_balanced_splits_without_a_common_sentence(task: Splits) -> None:
    assert task.keys() == SIZES.keys()
    for split, rows in task.items():
        counts = Counter(label for _, label in rows)
        assert counts.keys() == set(LABELS)
        assert counts["exchanged"] == counts["as written"] <= SIZES[split] // 2
        assert len({normalised(text) for text, _ in rows}) == len(rows)
        # A third of a run of one label would show that the order depends on it.
        assert 0.4 < sum(label == "exchanged" for _, label in rows[: len(rows) // 3]) / (len(rows) // 3) < 0.6
    if sys.version_info[:2] == (3, 11):  # whole, as its own installer leaves it
        assert (len(task["train"]), len(task["test"])) == (5000, 1000)


@pytest.mark.slow
def test_no_sentence_of_one_split_is_in_another_in_any_order(task: Splits) -> None:
    found = {split: {normalised(text) for text, _ in rows} for split, rows in task.items()}
    written = {
        split: {normalised(text) for text, label in rows if label == "as written"} for split, rows in task.items()
    }
    for split, rows in task.items():
        for other in task.keys() - {split}:
            assert not found[split] & found[other]
            # Nor is a changed sentence of one the written one of another.
            for text, label in rows:
                if label == "exchanged":
                    assert not {normalised(back) for back in neighbours(text)} & written[other]


def neighbours(text: str) -> list[str]:
    words = text.split()
    return [" ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]]) for i in range(len(words) - 1)]


def test_one_exchange_of_two_different_words_inside(tmp_path: Path) -> None:
    root, written = library(tmp_path, many()), {normalised(text) for text in many()}
    splits = build(root)
    for split, rows in splits.items():
        assert sum(label == "exchanged" for _, label in rows) == len(rows) / 2 > 0
        for text, label in rows:
            if label == "as written":
                assert normalised(text) in written
                assert split_of(text) == split
                continue
            assert normalised(text) not in written
            sources = [back for back in neighbours(text) if normalised(back) in written]
            assert sources
            assert all(split_of(source) == split for source in sources)
            assert (text.split()[0], text.split()[-1]) == ("The", "again.")
    assert build(root) == splits


def test_which_words_are_exchanged() -> None:
    assert sorted(exchanged("Return the THE list (sorted) of all names.")) == [
        "Return the THE list (sorted) all of names.",
        "Return the list THE (sorted) of all names.",
    ]
    assert list(exchanged("Return a, b, c, d, e.")) == []
    # Written down, as a task that changes makes results incomparable.
    assert next(exchanged("The old lamp holds the new river again.")) == FIRST


FIRST = "The old lamp the holds new river again."


def test_what_is_no_sentence_is_left_out(tmp_path: Path) -> None:
    root = library(
        tmp_path,
        [
            "Too few words in it.",
            "no capital at the start of this one.",
            "No full stop at the end of this one",
            "One sentence of the right size is here. And a second one follows right after it!",
            ">>> Some code that has six words or more.",
            "One sentence of the right size is here.",
        ],
    )
    assert list(sentences(root)) == [
        "One sentence of the right size is here.",
        "And a second one follows right after it!",
        "One sentence of the right size is here.",
    ]
    with pytest.raises(ValueError, match="too few docstrings"):
        build(root)
