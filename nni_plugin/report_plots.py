"""The figures of a pruning run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nni_plugin.svg_figures import ACCURACY, CHANNELS, INK, MACS, STYLE, TRACK, as_svg, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 600
_MOST_BARS = 80


def history_axis(history: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the key of a history's x axis and its label.

    Args:
        history: Rows in order of time, each with `epoch` or `step`.

    Returns:
        `("step", "minibatch")` where every row has a step, else `("epoch", "epoch")`.
    """
    steps = bool(history) and all(row.get("step") is not None for row in history)
    return ("step", "minibatch") if steps else ("epoch", "epoch")


def plot_history(
    history: Sequence[Mapping[str, Any]], *, baseline_top1: float | None = None, target: float | None = None
) -> str:
    """Draw test accuracy over time, above the share of channels and MACs kept at the same times.

    Args:
        history: Rows in order of time; each with `epoch` or `step`, and any of `top1` (percent), `kept`
            (share of channels, 0 to 1), `macs_ratio` (share of MACs, 0 to 1) and `phase` (a word).
        baseline_top1: Accuracy before pruning, in percent, drawn as a level.
        target: Share of MACs asked for, 0 to 1, drawn as a level.

    Returns:
        An `<svg>` element, or "" where there are not two rows to join.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    key, label = history_axis(history)
    series = {name: _series(history, key, name) for name in ("top1", "kept", "macs_ratio")}
    shares = [name for name in ("kept", "macs_ratio") if len(series[name][0]) > 1]
    panels = ["top1"] * (len(series["top1"][0]) > 1) + ["share"] * bool(shares)
    if not panels:
        return ""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(2.1 * len(panels) + 0.4)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            if panel == "top1":
                _draw_accuracy(ax, series["top1"], baseline_top1)
            else:
                _draw_shares(ax, {name: series[name] for name in shares}, target)
            _mark_phases(ax, history, key, with_names=ax is axes[0])
        axes[-1].set_xlabel(label)
        if key == "epoch":
            axes[-1].xaxis.get_major_locator().set_params(integer=True)
        return as_svg(figure, "h-", f"Top-1 accuracy and share of channels kept over the {label}s")


def plot_widths(widths: Sequence[tuple[str, int, int]]) -> tuple[str, int]:
    """Draw the channels kept of each layer as horizontal bars.

    Args:
        widths: Per layer its name, channels kept and channels before, in the order of the network.

    Returns:
        An `<svg>` element ("" without layers), and how many layers it shows: where there are too many
        for one figure, those that lost the largest share, still in the order of the network.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    if not widths:
        return "", 0
    import matplotlib

    most_cut = sorted(range(len(widths)), key=lambda i: widths[i][1] / max(widths[i][2], 1))[:_MOST_BARS]
    shown = [widths[i] for i in sorted(most_cut)]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.21 * len(shown) + 0.8)
        ax = figure.subplots()
        places = range(len(shown))
        ax.barh(places, [total for _, _, total in shown], color=TRACK, height=0.72, label="removed")
        ax.barh(places, [kept for _, kept, _ in shown], color=CHANNELS, height=0.72, label="kept")
        widest = max(total for _, _, total in shown)
        for place, (_, kept, total) in enumerate(shown):
            ax.text(total + 0.01 * widest, place, f"{kept} / {total}", va="center", fontsize=8)
        ax.set_yticks(places, [_shortened(name) for name, _, _ in shown])
        ax.set_ylim(len(shown) - 0.4, -0.6)  # the first layer on top
        ax.set_xlim(0, widest * 1.2)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("channels")
        return as_svg(figure, "w-", "Channels kept of each layer"), len(shown)


def _series(history: Sequence[Mapping[str, Any]], key: str, name: str) -> tuple[list[float], list[float]]:
    """Return x and y of the rows that have both, thinned evenly, first and last kept."""
    both = [(row.get(key), row.get(name)) for row in history]
    points = [(x, y) for x, y in both if x is not None and y is not None]
    if len(points) > _MOST_POINTS:
        last = len(points) - 1
        points = [points[round(i * last / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def _draw_accuracy(ax: Axes, points: tuple[list[float], list[float]], baseline: float | None) -> None:
    marker = "o" if len(points[0]) <= 60 else ""
    ax.plot(*points, color=ACCURACY, marker=marker, markersize=3.5, linewidth=1.6, label="test top-1")
    if baseline is not None:
        ax.axhline(baseline, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="before pruning")
    ax.set_ylabel("test top-1 (%)")
    ax.legend(loc="best", fontsize=8.5)


def _draw_shares(ax: Axes, series: Mapping[str, tuple[list[float], list[float]]], target: float | None) -> None:
    looks = {"kept": (CHANNELS, "-", "channels"), "macs_ratio": (MACS, "--", "MACs")}
    for name, (x, y) in series.items():
        color, line, label = looks[name]
        ax.plot(x, [100 * v for v in y], color=color, linestyle=line, linewidth=1.6, label=label)
    if target is not None:
        ax.axhline(100 * target, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="MACs asked for")
    ax.set_ylabel("kept (%)")
    ax.set_ylim(0, 105)
    ax.legend(loc="lower left", fontsize=8.5)


def _mark_phases(ax: Axes, history: Sequence[Mapping[str, Any]], key: str, *, with_names: bool) -> None:
    """Draw a thin line, and on the first panel a name, where a new phase begins."""
    previous = None
    for row in history:
        phase, x = row.get("phase"), row.get(key)
        if phase is None or phase == previous or x is None:
            continue
        if previous is not None:
            ax.axvline(x, color=INK, linewidth=0.7, alpha=0.6)
        if with_names:
            ax.annotate(
                str(phase), (x, 1.0), xycoords=("data", "axes fraction"), xytext=(2, 2),
                textcoords="offset points", fontsize=8.5,
            )  # fmt: skip
        previous = phase


def _shortened(name: str, longest: int = 30) -> str:
    """Return a name with its middle left out where it is too long for the axis."""
    if len(name) <= longest:
        return name
    # The front tells stage and block, the end which layer of the block.
    head = longest * 3 // 5
    return f"{name[:head]}…{name[head + 1 - longest :]}"
