"""What people read of the LayerPrune experiments: a table each, with the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nni_plugin.benchmarks.grid import interval, mean_and_sd
from nni_plugin.benchmarks.layerprune.figure import Cell, is_of_layers

PAPER_T1 = {
    "CIFAR-100": {
        ("magnitude", 0.2): (70.18, 70.00), ("magnitude", 0.3): (70.36, 69.1),
        ("feature-map", 0.2): (67.77, 67.7), ("feature-map", 0.3): (67.25, 66.34),
        ("taylor-fo", 0.2): (70.51, 70.01), ("taylor-fo", 0.3): (70.46, 68.27),
        ("bn-scale", 0.2): (70.79, 70.36), ("bn-scale", 0.3): (70.14, 69.4),
        ("geometric-median", 0.2): (70.34, 70.00), ("geometric-median", 0.3): (70.25, 68.68),
    },
    "CIFAR-10": {
        ("magnitude", 0.2): (92.35, 92.31), ("feature-map", 0.2): (91.94, 91.9), ("taylor-fo", 0.2): (92.88, 92.8),
        ("bn-scale", 0.2): (92.79, 92.76), ("geometric-median", 0.2): (92.57, 92.53),
    },
}  # fmt: skip
"""Iterative and one-shot, ResNet-56."""

PAPER_T2 = {
    "CIFAR-10": {1: (93.32, 93.32, 0.99), 2: (93.28, 93.31, 0.97), 3: (93.17, 93.15, 0.96), 4: (93.10, 93.03, 0.96)},
    "CIFAR-100": {1: (71.10, 71.10, 0.96), 2: (70.93, 70.94, 0.97), 3: (70.88, 70.86, 0.94), 4: (70.64, 70.71, 0.91)},
}
"""One-shot, iterative and Spearman, ResNet-56."""

PAPER_T3 = {"dense": 73.11, "magnitude": 73.01, "taylor-fo": 72.61, "LayerPrune_2": 73.60, "LayerPrune_5": 74.80}
"""VGG19-BN on CIFAR-100; filters: 500 removed."""

PAPER_T5 = {1: (76.72, 75.70), 2: (76.53, 75.96), 3: (76.40, 75.80), 4: (75.82, 75.0)}
"""Fine-tuned and from scratch, ResNet-50 on ImageNet."""

BASE_OF_PAPER = {"CIFAR-10": 93.55, "CIFAR-100": 71.2}
"""The dense ResNet-56."""


def render(result: Mapping[str, Any]) -> str:
    """Return the page: a section an experiment, every number from the result or the paper."""
    cells = result["cells"]
    text = [
        "# Whole layers or filters: LayerPrune's experiments",
        "",
        f"Test top-1 in percent on {result['dataset']}, mean ± standard deviation over seeds, each a dense network of "
        "its own; a number without deviation is of one seed. The paper's numbers (supplement of ACCV 2020) are on "
        "other data, which their columns name: compare orders and differences, not values.",
        "",
        *_settings(result),
        "",
        *_dense(cells),
    ]
    sections = (("t2", _table2), ("t1", _table1), ("t3", _table3), ("t5", _table5), ("f1", _figure1))
    for part, section in sections:
        of_part = [cell for cell in cells if cell["experiment"] == part]
        for network in dict.fromkeys(cell["network"] for cell in of_part):
            rows = [cell for cell in of_part if cell["network"] == network]
            text += ["", *section(network, rows, result)]
    refused = [(cell, reason) for cell in cells for reason in cell["refused"]]
    if refused:
        text += ["", "## Budgets that could not be met", ""]
        text += [f"- {_name(cell)}: {reason}" for cell, reason in refused]
    text += ["", "## Notes", "", *(f"- {note}" for note in result["notes"])]
    text += [
        "- Figures 2 to 4, the importance of each block by each criterion as bars: `nni-plugin layers --library "
        "nni_plugin --model resnet56 --checkpoint N/model.safetensors --dataset torch/fashion_mnist --data-dir D "
        "--in-chans 1 --output O`, with the folder `N` of a dense network.",
    ]
    return "\n".join(text) + "\n"


def _settings(result: Mapping[str, Any]) -> list[str]:
    lines = [f"Preset `{result['preset']}`. Against the paper's settings:", ""]
    for network, numbers in result["settings"].items():
        lines.append(f"- {network}: {'; '.join(numbers['reductions']) or 'the same'}")
    if result["preset"] == "full":
        lines.append(
            "- dense networks: 160 epochs, the learning rate falls at 61 and 122; the paper, which has these settings "
            "for another comparison, lets it fall at 81 and 122"
        )
    lines.append("")
    for place in result["measured_on"]:
        machine = place["machine"]
        unit = machine["CPU"] if place["device"] == "cpu" else machine["GPU"]
        how = f"{place['threads']} thread{'s' * (place['threads'] != 1)}" if place["device"] == "cpu" else "one GPU"
        lines.append(f"- latencies: {unit}, {how}, {place['dtype']}, batches of 1 and 64, torch {machine['torch']}")
    return lines


def _dense(cells: Iterable[Cell]) -> list[str]:
    rows = [
        [f"{cell['network']}", cell["top1_dense"], cell["top1_before"], cell["top1"], _list(cell["seeds"])]
        for cell in cells
        if cell["experiment"] == "control"
    ]
    return _table(["network", "dense", "statistics anew", "dense, fine-tuned", "seeds"], rows)


def _table2(network: str, cells: Sequence[Cell], result: Mapping[str, Any]) -> list[str]:
    by_label = {(cell["n"], cell["way"]): cell for cell in cells}
    removals = sorted({cell["n"] for cell in cells})
    header = ["n", "one-shot, before", "one-shot", "re-scored", "iterative", "iterative, same training"]
    header += ["Spearman, iterative", "Spearman, re-scored"]
    header += [f"paper, {data}: one-shot / iterative / Spearman" for data in PAPER_T2]
    accuracies, costs = [], []
    for n in removals:
        once, again, between = ((n, way) for way in ("one-shot", "re-scored", "iterative"))
        accuracies.append(
            [
                str(n),
                _of(by_label, once, "top1_before"),
                _of(by_label, once, "top1"),
                _of(by_label, again, "top1"),
                _of(by_label, between, "top1_between"),
                _of(by_label, between, "top1"),
                *(_fraction(_of(by_label, key, "spearman")) for key in (between, again)),
                *(_slashed(of_paper.get(n) if network == "resnet56" else None) for of_paper in PAPER_T2.values()),
            ]
        )
        cell = by_label.get(once, {})
        kept = [_fraction(cell.get(name)) for name in ("macs_ratio", "params_ratio", "latency_1", "latency_64")]
        costs.append([str(n), cell.get("top1_minus_control"), *kept, _blocks(cell)])
    return [
        f"## Table 2: {network}, blocks by Imprinting",
        "",
        *_table(header, accuracies),
        "",
        "The one-shot networks:",
        "",
        *_table(["n", "minus dense, fine-tuned", "MACs", "params", "latency, 1", "latency, 64", "blocks"], costs),
    ]


def _table1(network: str, cells: Sequence[Cell], result: Mapping[str, Any]) -> list[str]:
    by_label = {(cell["method"], cell["share"], cell["way"]): cell for cell in cells}
    header = ["criterion", "filters removed", "one-shot, before", "iterative", "one-shot", "MACs, iterative"]
    header += ["MACs, one-shot", *(f"paper, {data}: iterative / one-shot" for data in PAPER_T1)]
    rows = []
    for method, share in dict.fromkeys((cell["method"], cell["share"]) for cell in cells):
        once, step = (method, share, "one-shot"), (method, share, "iterative")
        paper = [of_data.get((method, share)) if network == "resnet56" else None for of_data in PAPER_T1.values()]
        rows.append(
            [
                f"`{method}`",
                f"{share:.0%}",
                _of(by_label, once, "top1_before"),
                _of(by_label, step, "top1"),
                _of(by_label, once, "top1"),
                _fraction(_of(by_label, step, "macs_ratio")),
                _fraction(_of(by_label, once, "macs_ratio")),
                *map(_slashed, paper),
            ]
        )
    base = " / ".join(f"{value} ({data})" for data, value in BASE_OF_PAPER.items())
    told = [] if network != "resnet56" else ["", f"The paper's dense network: {base}."]
    return [f"## Table 1: {network}, filters iteratively or at once", "", *_table(header, rows), *told]


def _table3(network: str, cells: Sequence[Cell], result: Mapping[str, Any]) -> list[str]:
    header = ["method", "goal", "before", "fine-tuned", "minus dense, fine-tuned", "latency, 1", "latency, 64", "MACs"]
    header += ["paper, CIFAR-100", "architecture, first seed"]
    rows = []
    for cell in cells:
        kept = [_fraction(cell.get(name)) for name in ("latency_1", "latency_64", "macs_ratio")]
        of_paper = PAPER_T3.get(cell["method"]) if not cell["goal"].startswith("latency") else None
        shown = next((found for found in cell["architectures"] if found), None)
        rows.append(
            [
                f"`{cell['method']}`",
                cell["goal"],
                *(cell.get(name) for name in ("top1_before", "top1", "top1_minus_control")),
                *kept,
                f"{of_paper:.2f}" if of_paper and network == "vgg19_bn" else "-",
                "-" if shown is None else " ".join(map(str, shown)),
            ]
        )
    told = f"The paper's dense network: {PAPER_T3['dense']} (CIFAR-100)."
    return [
        f"## Table 3: {network}, layers or filters, and what is left",
        "",
        *_table(header, rows),
        *(["", told] if network == "vgg19_bn" else []),
    ]


def _table5(network: str, cells: Sequence[Cell], result: Mapping[str, Any]) -> list[str]:
    header = ["n", "fine-tuned", "from scratch", "difference", "its 95 % interval"]
    header.append("paper, ResNet-50 on ImageNet: fine-tuned / from scratch")
    rows = []
    for cell in cells:
        gain = cell["top1_minus_scratch"]
        pair = _slashed(PAPER_T5.get(cell["n"]))
        rows.append([str(cell["n"]), cell["top1"], cell["top1_scratch"], gain, interval(gain), pair])
    return [f"## Table 5: {network} without n blocks, fine-tuned or from scratch", "", *_table(header, rows)]


def _figure1(network: str, cells: Sequence[Cell], result: Mapping[str, Any]) -> list[str]:
    header = ["asked", "method", "removes", "before", "fine-tuned", "minus dense, fine-tuned", "latency, 1"]
    header += ["latency, 64", "MACs", "blocks gone", "channels gone"]
    rows = []
    for cell in cells:
        gone = [blocks for blocks in cell["blocks"] if blocks is not None]
        counts = f"{sum(map(len, gone)) / len(gone):.1f}" if gone else "-"
        channels = mean_and_sd(cell["channels_removed"], 0) if "channels_removed" in cell else "-"
        rows.append(
            [
                f"{cell['asked']:g}",
                f"`{cell['method']}`",
                "layers" if is_of_layers(cell["method"]) else "filters",
                *(cell.get(name) for name in ("top1_before", "top1", "top1_minus_control")),
                *(_fraction(cell.get(name)) for name in ("latency_1", "latency_64", "macs_ratio")),
                counts,
                channels,
            ]
        )
    return [
        f"## Figure 1: {network}, accuracy at a latency",
        "",
        f"Budgets are fractions of the latency at batches of {result['latency_batch']}.",
        "",
        *_table(header, rows),
    ]


# -- tables -----------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a table of Markdown; a summary is written as mean and deviation, nothing as a dash."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(map(_text, row)) + " |" for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return mean_and_sd(value) if isinstance(value, Mapping) else str(value)


def _fraction(sample: Mapping[str, float | None] | None) -> str:
    return "-" if sample is None else mean_and_sd(sample, 3)


def _of(by_label: Mapping[Any, Cell], label: Any, value: str) -> Any:
    return by_label.get(label, {}).get(value)


def _slashed(values: Sequence[float] | None) -> str:
    return "-" if values is None else " / ".join(f"{value:.2f}" for value in values)


def _blocks(cell: Cell) -> str:
    """Return the blocks that left, once where all seeds agree."""
    found = [" ".join(sorted(blocks)) for blocks in cell.get("blocks", ()) if blocks is not None]
    return "; ".join(dict.fromkeys(found)) or "-"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _name(cell: Cell) -> str:
    labels = [cell.get(name) for name in ("experiment", "network", "method", "goal", "asked", "n", "share", "way")]
    return " ".join(str(label) for label in labels if label is not None)
