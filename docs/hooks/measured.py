"""Numbers on hand-written pages: read from benchmarks/results when the site is built, never typed.

A page with `measured: true` in its head is a Jinja template. Every result file is a variable under its name;
`only(rows, key=value, ...)` is the one row of a list with these values. Whatever is missing ends the build.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from mkdocs.exceptions import PluginError


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Fill in the numbers of a page that asks for them."""
    if not page.meta.get("measured"):
        return markdown
    return render(markdown, Path(config.config_file_path).parent / "benchmarks" / "results")


def render(text: str, results: Path) -> str:
    """Fill numbers of result files into a text.

    Args:
        text: The template.
        results: Folder of the JSON files.
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["pm"] = plus_minus
    environment.globals["only"] = only
    environment.globals.update({path.stem: json.loads(path.read_text("utf-8")) for path in results.glob("*.json")})
    return environment.from_string(text).render()


def only(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the one row with these values.

    Raises:
        PluginError: There is none, or several.
    """
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise PluginError(f"{len(found)} rows have {wanted}, expected one")
    return found[0]


def plus_minus(summary: dict[str, Any], digits: int = 2) -> str:
    """Return mean and standard deviation of a summary over seeds, the mean alone for one seed."""
    mean, deviation = (summary[name] for name in ("mean", "sd"))
    return f"{mean:.{digits}f}" + ("" if deviation is None else f"\u00a0±\u00a0{deviation:.{digits}f}")
