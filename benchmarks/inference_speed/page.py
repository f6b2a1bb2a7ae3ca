"""The page and the figure of the inference speeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_plugin.benchmarks.figures import save

Record = Mapping[str, Any]

_LAYOUTS = {
    "even": "every layer loses the same fraction of its channels.",
    "even-8": "the same, widths being multiples of 8.",
    "fitted": "early layers lose more or fewer channels than late ones, evenly over the depth, such that the "
    "parameters too are as many as in the paper's network; where its table tells them.",
    "taylor-fo": "the channels that Taylor-FO finds least important over all layers leave, widths being multiples of "
    "8. With random weights they leave elsewhere than in a trained network.",
}
_WAYS = {
    "eager": "as torch runs it.",
    "channels-last": "eager, weights and images in channels-last order.",
    "compile": "`torch.compile` by its defaults, one fixed batch.",
    "onnx": "exported by our adapter, run by ONNX Runtime, which folds normalisations into convolutions.",
}


def render(result: Record) -> str:
    """Return the page, every number from the result."""
    asked = result["settings"]
    page = [
        "# Inference speed of pruned ResNets",
        "",
        "Table 5 of the Taylor paper (Molchanov et al., CVPR 2019, supplement 6.2), repeated on this machine: "
        f"{' and '.join(result['networks'])} of torchvision at {asked['size']} px, {asked['dtype']}, dense and pruned "
        "in one run. Weights are random (their normalisations drawn, with the statistics of random images): accuracy "
        "is not in question here. At equal MACs, which channels leave decides the speed, so each goal is met by "
        "several layouts of widths:",
        "",
        *(f"- {name}: {_LAYOUTS[name]}" for name in asked["layouts"]),
        "",
        "Each in several ways:",
        "",
        *(f"- {way}: {_WAYS[way]}" for way in _in_order(cell["way"] for cell in result["cells"])),
        *(f"- {name} was left out: {reason}." for name, reason in result["left_out"].items()),
        "",
        "Goals of ResNet-101 are the MACs of the networks in the paper's Table 5, named by the fraction of gates that "
        "the paper kept; those of other networks are the fractions of MACs of the pruned ResNet-50 in the paper's "
        "figure, read off to about 0.02 of 4.09 GFLOPs.",
        "",
        f"All networks of a table ran in turns, {asked['rounds']} rounds, in eval mode without autograd, on one batch "
        f"that stays where it is; {asked['threads']} CPU thread{'s' * (asked['threads'] != 1)}, seed {asked['seed']}. "
        "Precision is what torch and ONNX Runtime default to, which on CUDA allows TF32. **Bold**: how many times "
        "faster than the dense network, median over the rounds. Then the median of a pass in ms for the whole batch, "
        "in brackets the distance between its quartiles.",
    ]
    for (network, device, batch), cells in _tables(result["cells"]):
        page += ["", f"## {network}, {device}, batch {batch}", "", *_times(cells), "", _between_layouts(cells)]
    page += ["", "## Time to get ready", "", *_preparations(result["cells"])]
    page += ["", "## Widths", "", *_widths(result["networks"])]
    page += ["", "## The paper's numbers", "", *_table5(result["table5"]), "", "## Machine", ""]
    machine = {**result.get("machine", {}), **asked["versions"], "torch threads": asked["threads"]}
    return "\n".join([*page, *(f"- {name}: {text}" for name, text in machine.items()), ""])


def _times(cells: Sequence[Record]) -> list[str]:
    ways = [cell["way"] for cell in cells]
    rows = []
    for timed in zip(*(cell["timed"] for cell in cells), strict=True):
        texts = [f"**{t['speedup']:.2f}** {t['median_ms']:.4g} ({t['iqr_ms']:.2g})" for t in timed]
        rows.append([timed[0]["goal"], timed[0]["layout"], *texts])
    return _table(["kept", "layout", *ways], rows, left=2)


def _between_layouts(cells: Sequence[Record]) -> str:
    """Say how far apart layouts of the same goal lie."""
    parts = []
    for cell in cells:
        by_goal: dict[str, list[Record]] = {}
        for timed in cell["timed"][1:]:
            by_goal.setdefault(timed["goal"], []).append(timed)
        spreads = [
            (max(rows, key=_speedup), min(rows, key=_speedup), goal) for goal, rows in by_goal.items() if len(rows) > 1
        ]
        if spreads:
            fast, slow, goal = max(spreads, key=lambda spread: _speedup(spread[0]) / _speedup(spread[1]))
            ratio = _speedup(fast) / _speedup(slow)
            parts.append(f"{cell['way']} {ratio:.2f} ({fast['layout']} over {slow['layout']}, {goal})")
    return f"Fastest over slowest layout at the same MACs, at most: {'; '.join(parts)}." if parts else ""


def _preparations(cells: Sequence[Record]) -> list[str]:
    rows = []
    for cell in cells:
        if cell["way"] in ("compile", "onnx"):
            dense, *pruned = (timed["seconds_to_prepare"] for timed in cell["timed"])
            where = [cell["network"], cell["way"], f"{cell['device']}, batch {cell['batch']}"]
            rows.append([*where, f"{dense:.1f}", f"{statistics.median(pruned):.1f}"])
    difference = max(timed["difference"] for cell in cells for timed in cell["timed"])
    said = f"The outputs differ from the eager ones by at most {difference:.1e} of the largest value."
    if not rows:
        return [said]
    lead = (
        "Seconds, not counted above. compile: the first pass, which compiles, in a cache that held none of the "
        "networks. onnx: export with its checks, and loading. Pruned: median over the networks."
    )
    return [lead, "", *_table(["network", "way", "where", "dense", "pruned"], rows, left=3), "", said]


def _widths(networks: Mapping[str, Sequence[Record]]) -> list[str]:
    lines: list[str] = [
        "MACs and parameters as counted on the network; then the channels kept in each stage, in percent."
    ]
    for network, variants in networks.items():
        stages = list(variants[0]["stages"])
        rows = []
        for variant in variants:
            shares = [f"{100 * kept / total:.0f}" for kept, total in variant["stages"].values()]
            sizes = [f"{variant['macs'] / 1e9:.3f}", f"{variant['params'] / 1e6:.2f}"]
            narrowest = str(min(variant["widths"].values()))
            rows.append([variant["goal"], variant["layout"], *sizes, *shares, narrowest])
        header = ["kept", "layout", "GMACs", "M parameters", *stages, "narrowest"]
        lines += ["", f"### {network}", "", *_table(header, rows, left=2)]
    return lines


def _table5(rows: Sequence[Record]) -> list[str]:
    lines = [
        "Quoted from Molchanov et al., CVPR 2019, supplement, Table 5: ResNet-101 on an NVIDIA Tesla V100, ms of a "
        "batch; the speed-ups over its first row are ours to compute. GFLOPs are multiply-accumulates, names the "
        "fraction of gates kept.",
        "",
    ]
    texts = []
    for row in rows:
        name = row["name"] + ", skip only" * row["skip_only"]
        numbers = [f"{row['gmacs']:.2f}", f"{row['params']:.1f}", f"{row['error']:.2f}"]
        times = [f"**{rows[0][key] / row[key]:.2f}** {row[key]:.1f}" for key in ("ms16", "ms256")]
        texts.append([name, *numbers, *times])
    return lines + _table(
        ["network", "GFLOPs", "M parameters", "top-1 error %", "batch 16", "batch 256"], texts, left=1
    )


def plot(result: Record, path: Path) -> None:
    """Draw speed-up against the MACs kept, a row of panels a table and a column a way, to a file (`.svg`, `.png` ...).

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    ways = _in_order(cell["way"] for cell in result["cells"])
    tables = list(_tables(result["cells"]))
    figure = Figure(figsize=(max(2.1 * len(ways) + 0.8, 5.6), 1.9 * len(tables) + 1.0), layout="constrained")
    panels = figure.subplots(len(tables), len(ways), sharex=True, sharey=True, squeeze=False)
    for ((network, device, batch), cells), row in zip(tables, panels, strict=True):
        by_way = {cell["way"]: cell["timed"] for cell in cells}
        for way, ax in zip(ways, row, strict=True):
            _draw(ax, result, network, by_way.get(way, []))
            ax.set_title(f"{network}, {device}, batch {batch}\n{way}", fontsize=8)
            ax.tick_params(labelsize=8)
            ax.grid(alpha=0.3)
        row[0].set_ylabel("speed-up", fontsize=9)
    for ax in panels[-1]:
        ax.set_xlabel("MACs kept (%)", fontsize=9)
    entries: dict[str, Any] = {}
    for ax in panels.flat:
        entries.update({label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)})
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=3, fontsize=8)
    save(figure, path)


# Okabe and Ito's colours, which colour-blind readers tell apart.
_LOOKS = {
    "even": ("o", "#0072B2"),
    "even-8": ("^", "#56B4E9"),
    "fitted": ("s", "#D55E00"),
    "taylor-fo": ("D", "#009E73"),
}


def _draw(ax: Any, result: Record, network: str, timed: Sequence[Record]) -> None:
    """Draw one panel: filled markers where all channels may leave, hollow ones where only those of skips may."""
    dense = result["networks"][network][0]["macs"]
    macs = {(v["goal"], v["layout"]): 100 * v["macs"] / dense for v in result["networks"][network]}
    skip_only = {goal["name"]: goal["skip_only"] for goal in result["goals"][network]}
    for layout, (marker, color) in _LOOKS.items():
        rows = [row for row in timed if row["layout"] == layout]
        for hollow in (False, True):
            points = sorted((macs[r["goal"], layout], r["speedup"]) for r in rows if skip_only[r["goal"]] == hollow)
            if points:
                x, y = zip(*points, strict=True)
                (line,) = ax.plot(x, y, marker=marker, color=color, markersize=4, linewidth=0.9)
                line.set_label(layout + ", skip only" * hollow)
                if hollow:
                    line.set(linestyle="none", markerfacecolor="none")
    grid = range(20, 101, 2)
    ax.plot(grid, [100 / x for x in grid], ":", color="#555555", linewidth=1, label="as the MACs")
    if network == "resnet101":
        first, *others = result["table5"]
        points = [(100 * row["gmacs"] / first["gmacs"], first["ms256"] / row["ms256"]) for row in others]
        label = "paper: V100, batch 256"
        ax.plot(*zip(*points, strict=True), "x", color="#000000", markersize=4, linestyle="none", label=label)


def _tables(cells: Sequence[Record]) -> Iterator[tuple[tuple[str, str, int], list[Record]]]:
    """Go through the cells by network, device and batch; what runs in several ways is one table."""

    def where(cell: Record) -> tuple[str, str, int]:
        return cell["network"], cell["device"], cell["batch"]

    return ((place, list(group)) for place, group in itertools.groupby(cells, where))


def _in_order(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _speedup(timed: Record) -> float:
    return float(timed["speedup"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return a table of Markdown whose first columns are text and whose others are numbers."""
    marks = ["---"] * left + ["--:"] * (len(header) - left)
    return ["| " + " | ".join(line) + " |" for line in (header, marks, *rows)]
