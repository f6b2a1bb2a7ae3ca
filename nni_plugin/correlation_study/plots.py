"""How criteria rank channels, as a picture: a panel a criterion, a point a channel, its rank by score and by Oracle.

A perfect criterion puts every point on the diagonal. Colours go from the first group of the network to the last, so
that a criterion which ranks well within layers but weighs layers wrongly shows as stripes beside the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nni_plugin.correlation import ranks

_COLUMNS = 4
_PANEL_INCHES = 2.5


def plot_ranks(
    path: Path,
    scores: Mapping[str, Mapping[str, Tensor]],
    changes: Mapping[str, Tensor],
    spearman: Mapping[str, float],
) -> None:
    """Draw the ranks of all channels by every criterion into a PNG file.

    Args:
        path: The file.
        scores: By criterion and group name, shape `[width]` each; a group may be missing.
        changes: Squared change of the loss by group name, in the order of the network; NaN where not measured.
        spearman: Each criterion's coefficient, for the title of its panel.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    groups = list(changes)
    measured = {name: ~change.isnan() for name, change in changes.items()}
    columns = min(_COLUMNS, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(_PANEL_INCHES * columns + 1, _PANEL_INCHES * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    points = None
    for ax, (method, found) in zip(axes.flat, scores.items(), strict=False):
        names = [name for name in groups if name in found]
        x = ranks(np.concatenate([_values(changes[name], measured[name]) for name in names]))
        y = ranks(np.concatenate([_values(found[name], measured[name]) for name in names]))
        depth = np.concatenate([np.full(int(measured[name].sum()), groups.index(name)) for name in names])
        ax.plot([0, 1], [0, 1], color="0.75", linewidth=0.8, zorder=0)
        size = max(1.0, min(12.0, 4000 / len(x)))
        points = ax.scatter(
            x, y, c=depth, s=size, cmap="viridis", vmin=0, vmax=max(len(groups) - 1, 1), linewidths=0, rasterized=True
        )
        rho = spearman[method]
        ax.set_title(f"{method}   " + ("" if math.isnan(rho) else f"{rho:.3f}"), fontsize=9, parse_math=False)
        ax.set_aspect("equal")
    for ax in axes.flat[len(scores) :]:
        ax.set_visible(False)
    figure.supxlabel("rank by the Oracle (0 least, 1 most important)", fontsize=9)
    figure.supylabel("rank by the criterion", fontsize=9)
    if points is not None:
        bar = figure.colorbar(points, ax=axes, ticks=[0, max(len(groups) - 1, 1)], shrink=0.6, aspect=40, pad=0.02)
        bar.ax.set_yticklabels(["first group", "last"], fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _values(tensor: Tensor, where: Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = tensor.double().cpu()[where.cpu()].numpy()
    return values
