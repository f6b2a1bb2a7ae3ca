"""Reads our docstrings for the API reference: what mkdocstrings' parser does not know of their form.

`Example:` is a section of doctests, as `Examples:` is, and not a note; Sphinx's roles name things.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Puts every docstring into the form that is parsed, once it has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _ROLE.sub(_name, text)


def _name(found: re.Match[str]) -> str:
    return f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`"
