"""Numbers of blocks as bars, as in LayerPrune's Figures 2 to 4: a panel a criterion, a bar a block, network order.

Scores of different criteria have no common scale, so every panel has its own. The smallest score of each, whose block
would leave first, stands out in colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_COLUMNS = 4
_PANEL_INCHES = 2.4
_BAR_INCHES = 0.17
_LEAST, _OTHERS = "#D55E00", "#0072B2"  # Okabe and Ito's, which colour-blind readers tell apart
_LONGEST_NAME = 28


@dataclass(frozen=True)
class Panel:
    """One panel of bars.

    Args:
        title: What stands above it.
        label: What its bars measure.
        values: One a block.
        spreads: Width of the bar of error around each value; None for none.
        mark_least: Whether the smallest value stands out.
    """

    title: str
    label: str
    values: Sequence[float]
    spreads: Sequence[float] | None = None
    mark_least: bool = True


def plot_panels(path: Path, blocks: Sequence[str], panels: Sequence[Panel]) -> None:
    """Draw bars for all blocks, the first one on top, into a PNG file.

    Args:
        path: The file.
        blocks: Names of the blocks, in the order of the network.
        panels: What to draw, at least one panel.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (_PANEL_INCHES * columns + 1.2, (_BAR_INCHES * len(blocks) + 1.0) * rows + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    places = range(len(blocks))
    for ax, panel in zip(axes.flat, panels, strict=False):
        least = panel.values.index(min(panel.values))
        colors = [_LEAST if panel.mark_least and place == least else _OTHERS for place in places]
        errors = None if panel.spreads is None else [spread / 2 for spread in panel.spreads]
        ax.barh(places, panel.values, color=colors, height=0.72, xerr=errors, error_kw={"linewidth": 0.8})
        ax.axvline(0, color="0.3", linewidth=0.6)
        ax.set_title(panel.title, fontsize=9, parse_math=False)
        ax.set_xlabel(panel.label, fontsize=7.5)
        ax.tick_params(labelsize=7)
        ax.ticklabel_format(axis="x", scilimits=(-2, 3))
        ax.xaxis.get_offset_text().set_fontsize(7)
        ax.margins(y=0.01)
    axes[0, 0].set_yticks(places, [_shortened(name) for name in blocks], parse_math=False)
    axes[0, 0].invert_yaxis()
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
