"""Formulas of the documentation, between dollars as on GitHub, become MathML while the pages are built.

A browser sets MathML by itself, so that a page needs no script, no font and no network for them. A formula that does
not parse ends the build.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import SubElement

from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexToMathML

_MATHML = LatexToMathML()
_BLOCK = re.compile(r"\s*\$\$(.+)\$\$\s*", re.DOTALL)
# A dollar that opens stands before no space and one that closes after none, so that prices are left alone.
_INLINE = r"(?<![\\$])\$(?![\s$])([^$\n]+(?:\n[^$\n]+)*)(?<!\s)\$(?![\d$])"


class _Block(BlockProcessor):
    """A paragraph that is one formula."""

    def test(self, parent: Any, block: str) -> bool:
        return _BLOCK.fullmatch(block) is not None

    def run(self, parent: Any, blocks: list[str]) -> None:
        found = _BLOCK.fullmatch(blocks.pop(0))
        assert found is not None
        mathml = _MATHML.convert_with_local_state(found[1].strip(), displaystyle=True)
        SubElement(parent, "p").text = self.parser.md.htmlStash.store(f'<div class="formula">{mathml}</div>')


class _Inline(InlineProcessor):
    """A formula in a sentence."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]
        mathml = _MATHML.convert_with_local_state(m[1], displaystyle=False)
        return self.md.htmlStash.store(mathml), m.start(0), m.end(0)


class Formulas(Extension):
    """The two for Python-Markdown."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Put them before what reads underscores and backslashes, and after code."""
        md.parser.blockprocessors.register(_Block(md.parser), "formula", 76)
        md.inlinePatterns.register(_Inline(_INLINE, md), "formula", 186)


def makeExtension(**options: Any) -> Formulas:
    """What Python-Markdown calls."""
    return Formulas(**options)
