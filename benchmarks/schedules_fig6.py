"""Single step, iterative and continuous pruning to the same number of channels, with the same training.

Molchanov et al., CVPR 2019, supplement 6.2, Figure 6: of ResNet-101's 20,096 channels 10,000 go at once, or 100 every
30 minibatches, or 100 every 30 minibatches while the training loss allows it. By its text the loss must then be ABOVE
the threshold; the authors' code prunes at or below it, and so do we: a step is taken once the network has recovered
from the last. Here ResNet-20 loses half of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from nni_plugin.benchmarks.experiment import Experiment, open_experiment
from nni_plugin.benchmarks.figures import save
from nni_plugin.benchmarks.grid import interval, mean_and_sd, paired, summary
from nni_plugin.benchmarks.presets import reductions
from nni_plugin.schedules import Continuous, Iterative, OneShot, Schedule

SCHEDULES = ("single step", "iterative", "continuous")
METHOD = "taylor-fo"
POINTS = 12
"""Points of a curve."""

NOTES = (
    "All coupled channels of ResNet-20 take part, those of the skip connections too; half of them stay.",
    "Settings of the ResNet-20 experiment (supplement 6.1), not those of the paper's ResNet-101 on ImageNet.",
    "Continuous: a step is taken when the mean training loss since the last check is at or below the threshold, which "
    "is the base network's training loss of its last epoch times a factor; the paper's 1.04 is for ImageNet.",
    "A single step scores over as many minibatches as lie between two steps of the others.",
    "Top-1 in percent on the test images: nothing is chosen by it.",
)


def run(
    preset: Literal["reduced", "full"] = "reduced",
    dataset: str | None = "torch/fashion_mnist",
    data_dir: Path | None = None,
    method: str = METHOD,
    seeds: tuple[int, ...] | None = None,
    kept: float = 0.5,
    threshold_factor: float = 1.25,
    folder: Path = Path("out/resnet20"),
    device: str | None = None,
) -> dict[str, Any]:
    """Run every schedule for every seed, and return the summary; a killed call goes on.

    Args:
        preset: `full` has the paper's numbers, `reduced` fewer; the result says which.
        dataset: `torch/fashion_mnist`, `torch/cifar10`, `digits` ...
        data_dir: Folder of the data; for Fashion-MNIST the environment variable FASHION_MNIST names it too.
        method: Name of the criterion.
        seeds: Which ones; as many as the preset says, from 0, if not given.
        kept: Share of the coupled channels that stays.
        threshold_factor: Threshold of continuous pruning over the base network's last training loss.
        folder: For the runs and the base networks, which other benchmarks may have trained already.
        device: cpu, cuda ...; the best there is if not given.
    """
    experiment = open_experiment(preset, dataset, data_dir, folder, device)
    seeds = tuple(range(experiment.preset.seeds)) if seeds is None else seeds
    cells = fill(experiment, method, seeds, kept, threshold_factor)
    summed = summarise(experiment, cells)
    return {"preset": preset, "method": method, "kept": kept, "threshold_factor": threshold_factor, **summed}


def schedule_of(experiment: Experiment, name: str, seed: int, threshold_factor: float) -> Schedule:
    """Return a schedule by name; the threshold of the continuous one is the base network's of this seed."""
    preset = experiment.preset
    if name == "single step":
        return OneShot(preset.every)
    if name == "iterative":
        return Iterative(preset.channels, preset.every)
    loss = float(experiment.base(seed)["history"][-1]["train_loss"])
    return Continuous(preset.channels, preset.every, loss_threshold=threshold_factor * loss)


def fill(
    experiment: Experiment, method: str, seeds: Sequence[int], kept: float, threshold_factor: float
) -> dict[str, dict[int, dict[str, Any]]]:
    """Do every run that is not done; records by schedule and seed."""
    cells: dict[str, dict[int, dict[str, Any]]] = {"base": {}, **{name: {} for name in SCHEDULES}}
    for seed in seeds:
        cells["base"][seed] = experiment.base(seed)
        every = max(1, experiment.steps(seed) // POINTS)
        for name in SCHEDULES:
            schedule = schedule_of(experiment, name, seed, threshold_factor)
            run_name = f"fig6/seed{seed}/{method}-{kept}-{name}".replace(" ", "-").replace(":", "_")
            cells[name][seed] = experiment.prune(run_name, seed, method, kept, schedule, evaluate_every=every)
    return cells


def summarise(experiment: Experiment, cells: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return means, standard deviations and intervals over the seeds, at the end and along the way."""
    rows = []
    reference = _by_seed(cells["iterative"], "top1")
    for name in SCHEDULES:
        records = cells[name]
        rows.append(
            {
                "schedule": name,
                "top1": {**summary(_by_seed(records, "top1").values()), "by_seed": _by_seed(records, "top1")},
                "minus_iterative": paired(_by_seed(records, "top1"), reference),
                "after_pruning": summary(record["top1_after_pruning"] for record in records.values() if record["over"]),
                "over": sum(record["over"] for record in records.values()),
                "channels": summary(record["channels"] for record in records.values()),
                "macs_ratio": summary(record["macs_ratio"] for record in records.values()),
                "seconds": summary(record["seconds"]["all"] for record in records.values())["mean"],
                "curve": _curve(list(records.values())),
            }
        )
    preset, base = experiment.preset, cells["base"]
    before = [record["channels_before"] for record in cells["iterative"].values()]
    return {
        "network": experiment.network,
        "dataset": preset.dataset,
        "data": next((record["data"] for record in base.values()), None),
        "settings": {**asdict(preset), "seeds": sorted(base)},
        "reductions": reductions(replace(preset, seeds=len(base))),
        "notes": list(NOTES),
        "channels_before": before[0] if before else None,
        "base": {**summary(_by_seed(base, "top1").values()), "by_seed": _by_seed(base, "top1")},
        "rows": rows,
    }


def _by_seed(records: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, float]:
    return {seed: float(record[key]) for seed, record in records.items()}


def _curve(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summarise the points that all seeds have, by minibatch."""
    curves = [{point["step"]: point for point in record["curve"]} for record in records]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [
        {
            "step": step,
            **{key: summary(curve[step][key] for curve in curves) for key in ("top1", "train_loss", "channels")},
        }
        for step in steps
    ]


# -- what people read -------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """Return the page: one table, every number from the result."""
    seeds = result["settings"]["seeds"]
    header = ["schedule", "top-1", "95 % interval", "minus iterative", "right after the last step", "channels left"]
    header.append("reached the target")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in result["rows"]:
        entries = [
            row["schedule"],
            mean_and_sd(row["top1"]),
            interval(row["top1"]),
            mean_and_sd(row["minus_iterative"]),
        ]
        entries += [mean_and_sd(row["after_pruning"]), mean_and_sd(row["channels"], 0)]
        entries.append(f"{row['over']} of {row['top1']['n']}")
        lines.append("| " + " | ".join(entries) + " |")
    opening = (
        f"Top-1 accuracy in percent of {result['network']} on {result['dataset']} by {result['method']}, mean ± "
        f"standard deviation over {len(seeds)} seed{'s' * (len(seeds) != 1)}; the base network has "
        f"{mean_and_sd(result['base'])} with {result['channels_before']} channels."
    )
    page = ["# Pruning at once, step by step, or as the loss allows", "", opening, "", *lines, ""]
    if result["reductions"]:
        page += ["Against the paper's settings for ResNet-20:", "", *(f"- {t}" for t in result["reductions"]), ""]
    page += ["Notes:", "", *(f"- {text}" for text in result["notes"]), ""]
    return "\n".join(page)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy and channels left over the minibatches, means and 95 % intervals, to a file (`.svg`, `.png` ...).

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    accuracy, channels = figure.subplots(2, 1, sharex=True)
    looks = zip(result["rows"], ("#D55E00", "#0072B2", "#009E73"), ("s-", "o-", "^-"), strict=True)
    for row, color, style in looks:
        points = row["curve"]
        steps = [point["step"] for point in points]
        top1 = [point["top1"] for point in points]
        accuracy.plot(steps, [p["mean"] for p in top1], style, color=color, markersize=4, label=row["schedule"])
        if all(p["low"] is not None for p in top1):
            accuracy.fill_between(steps, [p["low"] for p in top1], [p["high"] for p in top1], color=color, alpha=0.15)
        channels.plot(steps, [p["channels"]["mean"] for p in points], style, color=color, markersize=4)
    if result["base"]["mean"] is not None:
        accuracy.axhline(result["base"]["mean"], color="#555555", linewidth=1, linestyle=":", label="base network")
    accuracy.set_ylabel("test top-1 (%)")
    channels.set_ylabel("channels left")
    channels.set_ylim(bottom=0)
    channels.set_xlabel("minibatch")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    for ax in (accuracy, channels):
        ax.grid(alpha=0.3)
    save(figure, path)
