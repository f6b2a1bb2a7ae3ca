r"""Formulas as MathML, which browsers show by themselves: no script, no font, no request.

Written as `$...$` and `$$...$$`, handed over by `pymdownx.arithmatex` as `\(...\)` and `\[...\]`.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """Convert what is between arithmatex's marks."""
    return _FORMULA.sub(_mathml, text)


def _mathml(found: re.Match[str]) -> str:
    display = found[1] == "div"
    formula = convert(html.unescape(found[2]).strip(), display="block" if display else "inline")
    if "\\" in formula:  # a command that the converter does not know stays as it was written
        raise PluginError(f"This formula cannot be shown: {found[2].strip()}")
    return f'<div class="formula">{formula}</div>' if display else formula
