"""LayerPrune's Figure 1: accuracy against the fall of latency, for methods that remove filters or whole layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_plugin.benchmarks.figures import save

Cell = Mapping[str, Any]

LAYERS = ("imprinting", "block-gate", "layer-")
"""How the names of methods for whole layers begin."""

_COLORS = ("#E69F00", "#D55E00", "#CC79A7", "#000000", "#0072B2", "#56B4E9", "#009E73", "#7F7F7F")
# Okabe and Ito's, which colour-blind readers tell apart; squares and the like are filters, round ones layers.
_OF_FILTERS, _OF_LAYERS = ("s", "D", "^", "v"), ("o", "P", "X", "*")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against the fall of latency, a row of panels a network, to a file (`.svg`, `.png` ...).

    Points are the cells of Figure 1 and, by Imprinting, of Table 2; bars are 95 % intervals over the seeds.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    key = f"latency_{result['latency_batch']}"
    cells = [cell for cell in result["cells"] if key in cell and _method(cell) is not None]
    networks = list(dict.fromkeys(cell["network"] for cell in result["cells"]))
    methods = sorted({str(_method(cell)) for cell in cells}, key=lambda name: (is_of_layers(name), name))
    figure = Figure(figsize=(8.6, 3.6 * len(networks) + 0.7), layout="constrained")
    panels = figure.subplots(len(networks), 2, sharey="row", squeeze=False)
    for network, row in zip(networks, panels, strict=True):
        for ax, value, title in zip(row, ("top1_before", "top1"), ("before", "after"), strict=True):
            for method, look in zip(methods, _looks(methods), strict=True):
                own = [cell for cell in cells if cell["network"] == network and _method(cell) == method]
                own = sorted(
                    (cell for cell in own if value in cell), key=lambda cell: float(cell[key]["mean"]), reverse=True
                )
                if own:
                    _draw(ax, own, key, value, method, look)
            dense = [c for c in result["cells"] if c["experiment"] == "control" and c["network"] == network]
            for cell in dense:
                ax.axhline(cell[value]["mean"], color="#555555", linewidth=1, linestyle=":", label="dense, alike")
            ax.set_title(f"{network}, {title} fine-tuning", fontsize=10)
            ax.set_xlabel(f"latency reduction (%), batch {result['latency_batch']}")
            ax.grid(alpha=0.3)
        row[0].set_ylabel("test top-1 (%)")
    entries: dict[str, Any] = {}
    for ax in panels.flat:
        entries.update({label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)})
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=5, fontsize=8)
    save(figure, path)


def is_of_layers(method: str) -> bool:
    """Tell whether a method removes whole layers."""
    return method.startswith(LAYERS)


def _method(cell: Cell) -> str | None:
    """Return whose point a cell is in the figure; None for none."""
    if cell["experiment"] == "t2":
        return "imprinting" if cell["way"] == "one-shot" else None
    return str(cell["method"]) if cell["experiment"] == "f1" else None


def _looks(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return marker and colour of each method, those for layers apart from those for filters."""
    filters = sum(not is_of_layers(method) for method in methods)
    looks = []
    for place, method in enumerate(methods):
        mine = place - filters if is_of_layers(method) else place
        markers = _OF_LAYERS if is_of_layers(method) else _OF_FILTERS
        color = _COLORS[(mine % 4) + 4 * is_of_layers(method)]
        looks.append((markers[mine % len(markers)], color))
    return looks


def _draw(ax: Any, cells: Sequence[Cell], key: str, value: str, method: str, look: tuple[str, str]) -> None:
    marker, color = look
    falls = [100 * (1 - cell[key]["mean"]) for cell in cells]
    heights = [cell[value]["mean"] for cell in cells]
    spreads = [[_half(cell[name]) for cell in cells] for name in (key, value)]
    line = "-" if is_of_layers(method) else "--"
    ax.errorbar(
        falls,
        heights,
        xerr=[100 * half for half in spreads[0]],
        yerr=spreads[1],
        marker=marker,
        color=color,
        linestyle=line,
        linewidth=0.9,
        elinewidth=0.7,
        markersize=5,
        label=method,
    )


def _half(sample: Mapping[str, float | None]) -> float:
    high, mean = sample["high"], sample["mean"]
    return 0.0 if high is None or mean is None else high - mean
