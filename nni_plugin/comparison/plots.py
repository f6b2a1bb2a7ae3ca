"""Figures of a comparison: accuracy against what is left of MACs, parameters and measured time, with Pareto fronts.

Our methods are drawn filled and joined by solid lines, built-in ones hollow and dashed, each with its own marker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nni_plugin.adapters.hosts import is_built_in
from nni_plugin.comparison.analysis import Mean, Point, front
from nni_plugin.svg_figures import GRID, INK, SERIES, STYLE, as_svg, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"macs_ratio": "MACs kept (%)", "params_ratio": "parameters kept (%)", "latency_ratio": "latency kept (%)"}
"""What accuracy is drawn against."""

_MARKERS = "osD^v<>Pph*X"
_FRONT_WIDTH = 5.0


def plot_accuracy(points: Sequence[Point], cost: str, *, fine_tuned: bool = True, baseline: float) -> str:
    """Draw top-1 of every method against a cost, mean and standard deviation over seeds.

    Args:
        points: All methods at all targets.
        cost: One of :data:`AXES`.
        fine_tuned: After fine-tuning; else as the methods left the networks.
        baseline: Mean top-1 of the dense networks, in percent.

    Returns:
        An `<svg>` element.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    import matplotlib

    value = "top1" if fine_tuned else "top1_before_finetune"
    methods = sorted({p.method for p in points}, key=lambda method: (is_built_in(method), method))
    with matplotlib.rc_context(STYLE):
        columns = 3
        figure = new_figure(3.5 + 0.2 * math.ceil((len(methods) + 2) / columns))
        ax = figure.subplots()
        everything = [(100 * _mean(p, cost).mean, _mean(p, value).mean) for p in points]
        best = front(everything)
        ax.plot(
            *zip(*(everything[i] for i in best), strict=True),
            color=GRID, linewidth=_FRONT_WIDTH, solid_capstyle="round", zorder=1, label="Pareto front",
        )  # fmt: skip
        for number, method in enumerate(methods):
            _draw(ax, [p for p in points if p.method == method], cost, value, number)
        ax.axhline(baseline, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="dense")
        ax.set_xlabel(AXES[cost])
        ax.set_ylabel("test top-1 (%)" + ("" if fine_tuned else ", not fine-tuned"))
        figure.legend(loc="outside lower center", fontsize=8, ncols=columns)
        stage = "after" if fine_tuned else "before"
        return as_svg(figure, f"{cost}-{value}-", f"Top-1 accuracy {stage} fine-tuning against {AXES[cost]}")


def _draw(ax: Axes, points: Sequence[Point], cost: str, value: str, number: int) -> None:
    points = sorted(points, key=lambda p: _mean(p, cost).mean)
    color, method = SERIES[number % len(SERIES)], points[0].method
    built_in = is_built_in(method)
    ax.errorbar(
        [100 * _mean(p, cost).mean for p in points],
        [_mean(p, value).mean for p in points],
        xerr=[100 * _mean(p, cost).sd for p in points],
        yerr=[_mean(p, value).sd for p in points],
        color=color,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=5,
        markerfacecolor="none" if built_in else color,
        linestyle="--" if built_in else "-",
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2,
        label=method,
        zorder=2 if built_in else 3,
    )


def _mean(point: Point, name: str) -> Mean:
    value: Mean = getattr(point, name)
    return value
