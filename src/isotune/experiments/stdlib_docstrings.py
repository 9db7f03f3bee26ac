"""A text task that every Python installation carries: which standard-library module is this docstring from?

The sources are parsed with `ast` and never imported. The names of all the classes are masked in all texts, so
a docstring cannot give its module away by naming it, and masking itself tells nothing.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

# Not modules one would look a docstring up in: tests, vendored or generated copies, whole applications; and
# what lies in the folder without belonging to the library. Linux distributions leave several out anyway.
_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "turtle", "ensurepip", "pydoc_data"}
_EXCLUDED |= {"site-packages", "dist-packages"}


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, docstring) for every function, method and class under `root`, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        if _EXCLUDED.intersection((module, *parts)) or module.startswith("_") or not module.isidentifier():
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources do not matter here
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node)
                if text:
                    yield module, text


def normalised(text: str) -> str:
    """The text without case, punctuation, digits and spacing: equal for duplicates."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def split_of(text: str) -> str:
    """The split a text belongs to, by a hash of its normalised form: 15 % test, 10 % validation, 75 % train.

    The same docstring falls into the same split on every machine and Python version.
    """
    bucket = int.from_bytes(hashlib.sha256(normalised(text).encode()).digest()[:4], "big") % 20
    return "test" if bucket < 3 else "validation" if bucket < 5 else "train"


def build(root: Path | None = None, classes: int = 20) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """The task from the standard library's sources.

    Returns ({"train" | "validation" | "test": [(text, module), ...]}, module names). The classes are the
    `classes` modules with most docstrings. A text found in two modules has no right answer and is left out; a
    text found twice in one module is kept once; texts of fewer than three words are left out.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    owners: dict[str, set[str]] = defaultdict(set)
    texts: dict[str, str] = {}
    for module, text in docstrings(root):
        key = normalised(text)
        owners[key].add(module)
        texts.setdefault(key, text)
    unique = {key: next(iter(names)) for key, names in owners.items() if len(names) == 1 and key.count(" ") >= 2}
    counts = Counter(unique.values())
    names = sorted(sorted(counts, key=lambda name: (-counts[name], name))[:classes])
    if len(names) < 2:
        raise ValueError(
            f"the Python sources under {root} hold no docstrings to learn from; "
            "use a Python whose standard library is installed as source"
        )
    # Bounded by anything but a letter, as in `http_error` and `xml2`.
    letter = r"[^\W\d_]"
    mask = re.compile(rf"(?<!{letter})({'|'.join(map(re.escape, names))})(?!{letter})", re.IGNORECASE)
    # Masking can make two texts equal, so duplicates are looked for again in what the model will see.
    masked: dict[str, set[str]] = defaultdict(set)
    shown: dict[str, str] = {}
    for key, module in unique.items():
        if module in names:
            text = " ".join(mask.sub("…", texts[key]).split())
            masked[normalised(text)].add(module)
            shown.setdefault(normalised(text), text)
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for key, modules in masked.items():
        if len(modules) == 1 and key:
            splits[split_of(shown[key])].append((shown[key], next(iter(modules))))
    return splits, names
