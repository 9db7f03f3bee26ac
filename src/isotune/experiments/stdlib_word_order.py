"""A text task that every Python installation carries: were two neighbouring words of this sentence exchanged?

It is the bigram shift of Conneau et al., What you can cram into a single vector (ACL 2018), on sentences of the
standard library's docstrings. A sentence's split, whether it is changed, and where, depend on its own words alone. The
words exchanged are of letters alone and neither the first nor the last, so no capital and no full stop betrays them.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from isotune.experiments.stdlib_docstrings import docstrings, normalised, split_of

SIZES = {"train": 5000, "validation": 1000, "test": 1000}
"""The most sentences of each split; those whose hashes come first are taken."""
LABELS = ("as written", "exchanged")
_WORDS = range(6, 26)
_CODE = (">>>", "::")


def sentences(root: Path) -> Iterator[str]:
    """Yield the sentences of 6 to 25 words in the docstrings under `root`, in a fixed order."""
    for _, text in docstrings(root):
        for paragraph in re.split(r"\n\s*\n", text):
            if any(mark in paragraph for mark in _CODE):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if len(sentence.split()) in _WORDS and re.fullmatch(r"[A-Z].*[.!?]", sentence):
                    yield sentence


def exchanged(sentence: str) -> Iterator[str]:
    """Yield the sentence with two neighbouring words exchanged, once for each pair that may be, in a fixed order.

    Examples:
        >>> list(exchanged("Return the the list (sorted) of all names."))
        ['Return the list the (sorted) of all names.', 'Return the the list (sorted) all of names.']
    """
    words, digest = sentence.split(), _digest(sentence)
    places = range(1, len(words) - 2)
    for place in sorted(places, key=lambda place: digest[place % len(digest)]):
        one, other = words[place : place + 2]
        if (one + other).isalpha() and one.lower() != other.lower():
            yield " ".join([*words[:place], other, one, *words[place + 2 :]])


def build(root: Path | None = None) -> dict[str, list[tuple[str, str]]]:
    """The task from the standard library's sources.

    Each split has as many sentences of one label as of the other. A sentence that is found twice is kept once, and a
    change that would give another sentence of the library is not made.

    Returns:
        {"train" | "validation" | "test": [(text, label), ...]}, at most as many as SIZES says.

    Raises:
        ValueError: there are no sources, or too few for both labels in each split.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    originals: dict[str, str] = {}
    for sentence in sentences(root):
        originals.setdefault(normalised(sentence), sentence)
    found: dict[str, dict[str, list[str]]] = {split: {label: [] for label in LABELS} for split in SIZES}
    taken = set(originals)
    for sentence in sorted(originals.values(), key=_digest):
        changes = (text for text in exchanged(sentence) if normalised(text) not in taken)
        change = next(changes, None)
        if change is None:
            continue
        rows = found[split_of(sentence)]
        if _digest(sentence)[0] % 2:
            taken.add(normalised(change))
            rows["exchanged"].append(change)
        else:
            rows["as written"].append(sentence)
    splits = {}
    for split, rows in found.items():
        count = min(SIZES[split] // 2, *map(len, rows.values()))
        if not count:
            raise ValueError(
                f"the Python sources under {root} hold too few docstrings to learn from; "
                "use a Python whose standard library is installed as source"
            )
        pairs = [(text, label) for label in LABELS for text in rows[label][:count]]
        splits[split] = sorted(pairs, key=lambda pair: _digest(pair[0]))
    return splits


def _digest(sentence: str) -> bytes:
    return hashlib.sha256(("order " + normalised(sentence)).encode()).digest()
