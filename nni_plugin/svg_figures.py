"""Figures as inline SVG: text stays text, colours follow the page's light or dark scheme.

Matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables. The variables
hold colours of the Okabe-Ito palette, which colour-blind readers tell apart; line styles, markers and labels say
the same again for a print in grey.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH_INCHES = 5.2  # narrow, so that the text is still readable when a phone scales the figure down

# Stand-in colour -> what the page shows. No two may be equal, and none may be drawn otherwise.
INK, GRID, TRACK = "#010101", "#020202", "#030303"
ACCURACY, CHANNELS, MACS = "#040404", "#050505", "#060606"
SERIES = tuple(f"#0707{number:02x}" for number in range(7))
"""For as many series side by side; further ones take them again with other markers."""
_CSS = {
    INK: "currentColor",
    GRID: "var(--grid)",
    TRACK: "var(--track)",
    ACCURACY: "var(--accuracy)",
    CHANNELS: "var(--channels)",
    MACS: "var(--macs)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES)},
}
_ON_PAPER = {
    "currentColor": "#1b1d20",
    "var(--grid)": "#e3e6ea",
    **{
        f"var(--series-{number})": color
        for number, color in enumerate(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777"))
    },
}
"""Colours of a figure in a file of its own, on white."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nni-plugin",  # equal data gives an equal file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "text.parse_math": False,  # a layer may be called anything, a dollar sign included
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def new_figure(height_inches: float) -> Figure:
    """Return an empty figure of the pages' width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")


def as_svg(figure: Figure, prefix: str, description: str) -> str:
    """Return a figure as an `<svg>` element that fits the page around it."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # The page's style sheet gives the size; a fixed one would not fit a phone.
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Names must be unique in the page, not only in the figure.
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: match.group() + prefix, text)
    text = text.replace("'DejaVu Sans'", "system-ui")
    for stand_in, css in _CSS.items():
        text = text.replace(stand_in, css)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def standalone(svg: str) -> str:
    """Return a figure of :func:`as_svg` as the text of a file of its own, dark on white."""
    for css, color in _ON_PAPER.items():
        svg = svg.replace(css, color)
    on_white = svg.replace("<svg", '<svg style="background: #ffffff"', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{on_white}\n'
