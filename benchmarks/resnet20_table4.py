"""ResNet-20, first layers of the residual blocks pruned by several criteria, against the same widths from scratch.

Molchanov et al., CVPR 2019, supplement 6.1, Table 4: of the 336 channels between the two convolutions of each block
10 go every 30 minibatches while training goes on, until 223 (Prune A) or 119 (Prune B) are left; then fine-tuning to
the end. Each pruned network is set against fresh weights of the same widths, trained as long as base network and
pruned network together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from nni_plugin.benchmarks.experiment import Experiment, open_experiment, runs_network
from nni_plugin.benchmarks.figures import save
from nni_plugin.benchmarks.grid import interval, mean_and_sd, paired, summary
from nni_plugin.benchmarks.presets import reductions
from nni_plugin.methods import METHODS, create_criterion
from nni_plugin.networks import NETWORKS
from nni_plugin.schedules import Iterative

CRITERIA = ("random", "oracle", "magnitude", "obd", "taylor-fo", "taylor-so", "taylor-fisher")
TARGETS = (223, 119)
REFERENCE = "taylor-fo"

PAPER: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "A": {
        "pruned": {
            "random": (88.22, 0.51),
            "oracle": (91.61, 0.10),
            "magnitude": (86.93, 0.25),
            "obd": (91.57, 0.15),
            "taylor-fo": (91.52, 0.11),
            "taylor-so": (91.56, 0.14),
        },
        "scratch": {
            "random": (86.28, 3.59),
            "oracle": (89.55, 0.22),
            "magnitude": (80.97, 4.07),
            "obd": (89.62, 0.24),
            "taylor-fo": (89.56, 0.19),
            "taylor-so": (89.63, 0.20),
        },
    },
    "B": {
        "pruned": {
            "random": (71.49, 2.35),
            "oracle": (89.72, 0.10),
            "magnitude": (62.03, 1.36),
            "obd": (89.78, 0.16),
            "taylor-fo": (89.78, 0.18),
            "taylor-so": (89.76, 0.17),
        },
        "scratch": {
            "random": (77.90, 7.01),
            "oracle": (88.25, 0.28),
            "magnitude": (62.08, 1.08),
            "obd": (88.14, 0.22),
            "taylor-fo": (88.17, 0.22),
            "taylor-so": (88.29, 0.19),
        },
    },
}
"""Table 4: mean and standard deviation of top-1 over 10 seeds on CIFAR-10."""

NOTES = (
    "Only the first convolution of every residual block is pruned; no layer loses its last channel.",
    "Top-1 in percent on the test images after the last epoch: nothing is chosen by it.",
    "Each seed has its own base network, data order and, where scores are drawn, scores; the paper prunes one base.",
    "Scores are averaged over the minibatches of a window and, with momentum 0.9, over windows, as in the authors' "
    "code.",
    "Shortcuts that change the shape are 1x1 convolutions with BN; the 336 channels between the convolutions of the "
    "blocks are those of any ResNet-20.",
    "SGD with momentum 0.9. Batch size and weight decay are not stated in the paper: see the settings.",
    "The base network's learning rate falls by ten every 80 of 200 epochs (or their share); the paper's text names "
    "the first fall only.",
    "From scratch: fresh weights, the base network's schedule stretched to the epochs of base training and "
    "fine-tuning together; the paper does not state its own.",
)


def run(
    preset: Literal["reduced", "full"] = "reduced",
    dataset: str | None = None,
    data_dir: Path | None = None,
    methods: tuple[str, ...] = CRITERIA,
    seeds: tuple[int, ...] | None = None,
    targets: tuple[int, ...] = TARGETS,
    scratch: bool = True,
    collect: bool = False,
    folder: Path = Path("out/resnet20"),
    device: str | None = None,
) -> dict[str, Any]:
    """Fill the grid of seeds, methods and targets, and return its summary; a killed call goes on.

    Args:
        preset: `full` has the paper's numbers, `reduced` fewer; the result says which.
        dataset: `torch/cifar10`, `torch/fashion_mnist`, `digits` ...; the preset's if not given.
        data_dir: Folder of the data; for Fashion-MNIST the environment variable FASHION_MNIST names it too.
        methods: Names of methods, or `all`.
        seeds: Which ones; as many as the preset says, from 0, if not given.
        targets: Channels left of the 336, Prune A first.
        scratch: Whether to train the pruned widths from scratch too.
        collect: Run nothing, and sum up what is done.
        folder: For the runs and the base networks.
        device: cpu, cuda ...; the best there is if not given.
    """
    experiment = open_experiment(preset, dataset, data_dir, folder, device)
    chosen = tuple(METHODS) if tuple(methods) == ("all",) else tuple(methods)
    seeds = tuple(range(experiment.preset.seeds)) if seeds is None else seeds
    cells = fill(experiment, chosen, seeds, targets, scratch=scratch, collect=collect)
    return {"preset": preset, **summarise(experiment, chosen, targets, cells)}


def all_but_first_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the convolutions of a residual network that are not the first of their block, by name."""
    convolutions = (name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    return tuple(name for name in convolutions if not name.endswith(".conv1"))


def fill(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int],
    targets: Sequence[int],
    *,
    scratch: bool = True,
    collect: bool = False,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Do every run that is not done; seed by seed, so that a broken-off grid compares what it has.

    Returns:
        Records by name of the run (`base`, `taylor-fo-A`, `taylor-fo-A-scratch`) and seed.

    Raises:
        CriterionError: There is no such method; nothing has been run.
    """
    for method in methods:
        create_criterion(method, 0)
    grid, preset = experiment.grid, experiment.preset
    schedule = Iterative(preset.channels, preset.every)
    ignore = all_but_first_layers(NETWORKS[experiment.network]())
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in seeds:
        if collect and not grid.done(f"base/seed{seed}"):
            continue
        cells.setdefault("base", {})[seed] = experiment.base(seed)
        for method in methods:
            for label, target in _labelled(targets):
                cell = f"{method}-{label}"
                name = f"table4/seed{seed}/{cell}".replace(":", "_")
                if collect and not grid.done(name):
                    continue
                pruned = experiment.prune(name, seed, method, target, schedule, ignore=ignore)
                cells.setdefault(cell, {})[seed] = pruned
                if scratch and not (collect and not grid.done(f"{name}-scratch")):
                    fresh = experiment.scratch(f"{name}-scratch", seed, pruned["widths"])
                    cells.setdefault(f"{cell}-scratch", {})[seed] = fresh
    return cells


def summarise(
    experiment: Experiment,
    methods: Sequence[str],
    targets: Sequence[int],
    cells: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return means, standard deviations and intervals over the seeds of every cell, and how they came about."""
    preset = experiment.preset
    costly = [method for method in methods if runs_network(create_criterion(method, 0))]
    notes = list(NOTES)
    if costly:
        notes.append(
            f"{', '.join(costly)}: scores are of the last minibatch before each step alone, for the network is run "
            "once a channel."
        )
    rows = []
    for label, target in _labelled(targets):
        for method in methods:
            pruned = cells.get(f"{method}-{label}", {})
            fresh = cells.get(f"{method}-{label}-scratch", {})
            reference = cells.get(f"{REFERENCE}-{label}", {})
            rows.append(
                {
                    "method": method,
                    "prune": label,
                    "channels": target,
                    "pruned": _described(pruned, "top1"),
                    "after_pruning": _described(pruned, "top1_after_pruning"),
                    "scratch": _described(fresh, "top1"),
                    "pruned_minus_scratch": paired(_by_seed(pruned, "top1"), _by_seed(fresh, "top1")),
                    f"pruned_minus_{REFERENCE}": paired(_by_seed(pruned, "top1"), _by_seed(reference, "top1")),
                    "macs_ratio": _described(pruned, "macs_ratio"),
                    "seconds": {
                        "pruned": _mean_seconds(pruned),
                        "scratch": _mean_seconds(fresh),
                        "scoring": summary(record["seconds"]["score"] for record in pruned.values())["mean"],
                    },
                }
            )
    base = cells.get("base", {})
    return {
        "network": experiment.network,
        "dataset": preset.dataset,
        "data": next((record["data"] for record in base.values()), None),
        "settings": {**asdict(preset), "scratch": asdict(preset.scratch), "seeds": sorted(base)},
        "reductions": reductions(replace(preset, seeds=len(base))),
        "notes": notes,
        "base": {**_described(base, "top1"), "seconds": _mean_seconds(base)},
        "rows": rows,
        "paper": PAPER if tuple(targets) == TARGETS else {},
    }


def _labelled(targets: Sequence[int]) -> list[tuple[str, int]]:
    return [(chr(ord("A") + number), target) for number, target in enumerate(targets)]


def _by_seed(records: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, float]:
    return {seed: float(record[key]) for seed, record in records.items()}


def _described(records: Mapping[int, Mapping[str, Any]], key: str) -> dict[str, Any]:
    values = _by_seed(records, key)
    return {**summary(values.values()), "by_seed": values}


def _mean_seconds(records: Mapping[int, Mapping[str, Any]]) -> float | None:
    return summary(record["seconds"]["all"] for record in records.values())["mean"]


# -- what people read -------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """Return the page: one table, every number from the result."""
    labels = list(dict.fromkeys(row["prune"] for row in result["rows"]))
    left = {row["prune"]: row["channels"] for row in result["rows"]}
    header = ["method"]
    for label in labels:
        header += [f"Prune {label} ({left[label]} channels)", "95 % interval", f"{label} from scratch"]
        header += [f"{label}, paper", f"{label} from scratch, paper"] * bool(result["paper"])
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        entries = [method]
        for row in (row for row in result["rows"] if row["method"] == method):
            entries += [mean_and_sd(row["pruned"]), interval(row["pruned"]), mean_and_sd(row["scratch"])]
            if result["paper"]:
                entries += [_of_paper(result["paper"], row["prune"], kind, method) for kind in ("pruned", "scratch")]
        lines.append("| " + " | ".join(entries) + " |")
    seeds = result["settings"]["seeds"]
    opening = (
        f"Top-1 accuracy in percent of {result['network']} on {result['dataset']}, mean ± standard deviation over "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}; the base network has {mean_and_sd(result['base'])}."
    )
    if result["paper"]:
        opening += " The paper's columns are its Table 4, on CIFAR-10."
    page = ["# ResNet-20, the first layer of every block pruned", "", opening, "", *lines, ""]
    if result["reductions"]:
        page += ["Against the paper's settings:", "", *(f"- {text}" for text in result["reductions"]), ""]
    page += ["Notes:", "", *(f"- {text}" for text in result["notes"]), ""]
    return "\n".join(page)


def _of_paper(paper: Mapping[str, Any], label: str, kind: str, method: str) -> str:
    mean, sd = paper[label][kind].get(method, (None, None))
    return mean_and_sd({"mean": mean, "sd": sd})


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy by method with its intervals, a panel for each target, to a file (`.svg`, `.png` ...).

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row["prune"] for row in result["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    size = (4.2 * len(labels), 0.34 * len(methods) + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for label, ax in zip(labels, axes, strict=True):
        rows = {row["method"]: row for row in result["rows"] if row["prune"] == label}
        for kind, marker, color, shift in (("pruned", "o", "#0072B2", -0.13), ("scratch", "s", "#D55E00", 0.13)):
            shown = [(place, rows[method][kind]) for place, method in enumerate(methods) if rows[method][kind]["n"]]
            if not shown:
                continue
            means = [sample["mean"] for _, sample in shown]
            halves = [0.0 if sample["high"] is None else sample["high"] - sample["mean"] for _, sample in shown]
            name = "pruned and fine-tuned" if kind == "pruned" else "same widths from scratch"
            heights = [place + shift for place, _ in shown]
            ax.errorbar(means, heights, xerr=halves, fmt=marker, color=color, capsize=3, markersize=4, label=name)
        if result["base"]["mean"] is not None:
            ax.axvline(result["base"]["mean"], color="#555555", linewidth=1, linestyle=":", label="base network")
        ax.set_title(f"Prune {label}: {next(iter(rows.values()))['channels']} channels left")
        ax.set_xlabel("test top-1 (%), mean and 95 % interval")
        ax.set_yticks(range(len(methods)), methods)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    save(figure, path)
