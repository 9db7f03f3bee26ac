"""The pages of the documentation and the README, cut into what can be checked."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """Code of a page."""

    page: str
    language: str
    text: str


def text_of(page: str) -> str:
    """A page as it is written."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[Block]:
    """The code blocks of a page in a language, those in lists too."""
    found = _BLOCK.findall(text_of(page))
    return [Block(page, kind, textwrap.dedent(text)) for _, kind, text in found if kind == language]


def commands(page: str) -> Iterator[list[str]]:
    """The arguments of every call of isotune in the shell blocks of a page, those by launchers too."""
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True) if "isotune" in line and "$(" not in line else []
            if words[:1] == ["isotune"]:
                yield words[1:]
            elif "isotune" in words and words[words.index("isotune") - 1] == "-m":
                yield words[words.index("isotune") + 1 :]


def anchors(page: str) -> set[str]:
    """What a link to a place of a page may name."""
    found: dict[str, int] = {}
    names = set(re.findall(r"\{ #([\w-]+) \}", text_of(page)))
    for title in re.findall(r"^#+ (.+)$", re.sub(_BLOCK, "", text_of(page)), re.MULTILINE):
        slug = re.sub(r"[^\w\s-]", "", re.sub(r"\{ #.*\}|\]\(.*?\)", "", title)).strip().lower()
        slug = re.sub(r"[-\s]+", "-", slug)
        names.add(f"{slug}_{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names | {f"isotune.{name}" for name in re.findall(r"^::: isotune\.(\S+)$", text_of(page), re.MULTILINE)}
