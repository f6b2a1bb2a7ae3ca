"""Pages of HTML from templates: one file each that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from typing import Any

NOTHING = "\u2013"
"""An en dash, for a value that is not there."""

NO_PLOTS = 'Written without figures, since Matplotlib is not installed: pip install "nni-plugin[plots]".'


def render_page(template: str, **values: Any) -> str:
    """Fill in a template of the package.

    Args:
        template: Name of a file in `templates/`.
        **values: What it shows; text is escaped, `markupsafe.Markup` is not, and a name that is missing is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nni_plugin"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
