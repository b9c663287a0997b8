"""Formulas and references of the docstrings, as the site shows them; nothing is fetched when the pages are read.

A griffe extension, see mkdocs.yml: ``:math:`` becomes a picture drawn by matplotlib, with the formula as its text, and
``:func:`` and the like a link, where the name is public.
"""

from __future__ import annotations

import re
from base64 import b64encode
from html import escape
from io import BytesIO
from typing import Any

import griffe
from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

DISPLAYED = re.compile(r"^\.\. math:: (.*(?:\n .*)*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]*)`")
REFERENCE = re.compile(r":(?:class|func|meth|mod):`([^`]*)`")
SPELLINGS = {r"\tfrac": r"\frac", r"\lVert": r"\Vert ", r"\rVert": r"\Vert ", r"\Big": "", "frac12": "frac{1}{2}"}
"""TeX that matplotlib does not know, in words that it knows."""
SIZE = 12.0
"""Points that count as 1 em."""


def picture(formula: str) -> str:
    """An image that stands on the line of the text."""
    drawn = " ".join(formula.split())
    for spelling, known in SPELLINGS.items():
        drawn = drawn.replace(spelling, known)
    drawn = re.sub(r"\\sqrt(\\\w+)", r"\\sqrt{\1}", drawn)
    svg = BytesIO()
    with rc_context({"mathtext.fontset": "cm", "svg.hashsalt": "formulas"}):
        depth = math_to_image(f"${drawn}$", svg, FontProperties(size=SIZE), dpi=72, format="svg")
    height = float(re.search(r'height="([\d.]+)pt"', svg.getvalue().decode())[1])  # type: ignore[index]
    style = f"height:{height / SIZE:.3f}em;vertical-align:{-depth / SIZE:.3f}em"
    data = b64encode(svg.getvalue()).decode()
    return f'<img alt="{escape(formula)}" style="{style}" src="data:image/svg+xml;base64,{data}">'


class Formulas(griffe.Extension):
    """Rewrites every docstring of a package, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called by griffe."""
        public = {name: f"{pkg.path}.{name}" for name in pkg.members if not name.startswith("_")}
        functional = pkg["functional"]
        public |= {name: f"{functional.path}.{name}" for name in functional.members if not name.startswith("_")}
        self._visit(pkg, public | {path: path for path in public.values()})

    def _visit(self, found: griffe.Object, public: dict[str, str]) -> None:
        if found.docstring is not None:
            found.docstring.value = _rewritten(found.docstring.value, public)
        for member in found.members.values():
            if not member.is_alias:
                self._visit(member, public)  # type: ignore[arg-type]


def _rewritten(text: str, public: dict[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f"[`{name}`][{public[name]}]" if name in public else f"`{name}`"

    text = DISPLAYED.sub(lambda match: f"{picture(match[1])}\n", text)
    return REFERENCE.sub(link, INLINE.sub(lambda match: picture(match[1]), text))
