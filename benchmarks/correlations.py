"""How every criterion ranks channels, judged by the Oracle, on the papers' CIFAR networks and several seeds.

The networks of `joint_removal` (`presets.DENSE`), trained once a seed for both, are handed to `nni-plugin correlate`:
all our criteria, Torch-Pruning's and NNI's, against the squared change of the loss when a channel alone is removed, on
the training images that the criteria see and on test images (Molchanov et al., CVPR 2019, Section 4).

The Oracle takes a third of a forward pass for each channel and minibatch; on wide networks it judges some channels of
each group, drawn by the seed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nni_plugin.benchmarks.experiment import Experiment
from nni_plugin.benchmarks.grid import Grid, mean_and_sd, summary
from nni_plugin.benchmarks.presets import DENSE
from nni_plugin.correlation_study.job import CorrelationJob, run_correlations
from nni_plugin.correlation_study.results import COLUMNS

NOTES = (
    "Spearman: over the channels of all groups together. Per group: the mean of Spearman's coefficient within each "
    "group. Held out: the same scores against the Oracle on test images, which neither training nor scoring has seen.",
    "Signed: the predicted change of the loss against the true one with its sign, for criteria that predict one.",
    "Agreement: the Oracle on training images against the Oracle on held-out ones, which shows the noise of the "
    "images.",
    "Seconds are those of scoring all groups once, with the forward and backward passes that it takes.",
    "Criteria are called as their libraries ship them: tp:taylor-tuned alone is set otherwise (sum before the absolute "
    "value, sum over layers, undivided), and tp:group-norm is undivided.",
    "tp:hessian is given the gradient of every sample; its library keeps that of the last.",
    "NNI scores layers one at a time: a coupled channel has the score of the first layer that writes it. nni:slim is "
    "the published |gamma|, for NNI's own factor is a constant before its training. nni:level by output channels is "
    "nni:l1.",
)

_SHOWN = {
    "Spearman": "spearman",
    "per group": "spearman_per_group",
    "held out": "spearman_held_out",
    "Kendall": "kendall",
    "Pearson": "pearson",
    "signed": "spearman_signed",
    "seconds": "seconds",
}


def run(
    networks: tuple[str, ...] = tuple(DENSE),
    seeds: tuple[int, ...] = (0, 1, 2),
    images: int = 1000,
    held_out_images: int = 1000,
    channels_per_group: int | None = None,
    methods: tuple[str, ...] | None = None,
    folder: Path = Path("out/correlations"),
    dense: Path = Path("out/joint_removal"),
    data_dir: Path | None = None,
    device: str | None = None,
    gather: bool = False,
) -> dict[str, Any]:
    """Compare the criteria on every network with every seed, and return means; a killed call goes on.

    Args:
        networks: Of `presets.DENSE`.
        seeds: Of weights, order of the data and random scores.
        images: Training images that the criteria and the Oracle see.
        held_out_images: Test images that the Oracle alone sees.
        channels_per_group: The Oracle judges at most so many channels of each group; all if not given.
        methods: Criteria; all if not given.
        folder: For the runs, one JSON file each, with the Oracle's numbers and the figure beside it.
        dense: For the dense networks, trained once a seed; that of `joint_removal`.
        data_dir: Folder of the data; the environment variable FASHION_MNIST names it too.
        device: cpu, cuda ...; the best there is if not given.
        gather: Run nothing: sum up the runs that the folder holds.
    """
    asked: dict[str, Any] = {
        "images": images,
        "held_out_images": held_out_images,
        "channels_per_group": channels_per_group,
    }
    grid = Grid(Path(folder), asked)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for network in networks:
        preset = DENSE[network]
        study = Experiment(preset, Path(dense) / network, data_dir=data_dir, device=device, network=network)
        for seed in seeds:
            if gather and not grid.done(f"{network}/seed{seed}"):
                continue
            study.base(seed)
            channels = study.data(seed).input_shape[0]
            job = CorrelationJob(
                model=network,
                output=Path(),  # the grid says where
                library="nni_plugin",
                checkpoint=study.saved(seed) / "model.safetensors",
                dataset=preset.dataset,
                data_dir=study.data_dir,
                data_kwargs={"batch_size": preset.batch_size, "img_size": preset.img_size, "in_chans": channels},
                methods=methods,
                held_out_from="test",
                device=device,
                seed=seed,
                **asked,
            )
            name = f"{network}/seed{seed}"
            chosen = {"methods": list(job.chosen())}
            runs.setdefault(network, {})[seed] = grid.run(name, _work(job, Path(folder) / name), chosen)
    return {
        "settings": {
            **asked,
            "dense": {network: DENSE[network].training() for network in networks},
        },
        "networks": {network: _summed_up(list(found.values())) for network, found in runs.items()},
    }


def _work(job: CorrelationJob, beside: Path) -> Callable[[Path], dict[str, Any]]:
    """Return what the grid is to do: one comparison, whose files but the record are kept beside the grid's own."""

    def work(state: Path) -> dict[str, Any]:
        output = state / "run"
        done = output / "correlations.json"
        if done.is_file():  # killed just after it was written
            record = json.loads(done.read_text())
        else:
            record = run_correlations(replace(job, output=output), resume=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
        for name in ("oracle.csv", "correlations.png"):
            shutil.copyfile(output / name, beside.with_name(f"{beside.name}-{name}"))
        kept = ("network", "data", "minibatches", "criteria", "skipped", "oracle", "versions", "machine")
        return {key: record[key] for key in kept}

    return work


def _summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and standard deviations over the seeds of one network."""
    agreements = [run["oracle"]["agreement_with_held_out"] for run in runs]
    return {
        "channels": runs[0]["network"]["channels"],
        "judged": runs[0]["network"]["judged"],
        "groups": runs[0]["network"]["groups"],
        "top1": _summary([run["network"]["top1"] for run in runs]),
        "oracle_seconds": _summary([run["oracle"]["seconds"] for run in runs]),
        "agreement": _summary([None if found is None else found["spearman"] for found in agreements]),
        "criteria": {
            method: {
                column: _summary([run["criteria"][method][column] for run in runs])
                for column in COLUMNS
                if column not in ("criterion", "channels")
            }
            for method in runs[0]["criteria"]
        },
        "skipped": {method: reason for run in runs for method, reason in run["skipped"].items()},
        "machines": [dict(text) for text in dict.fromkeys(tuple(run["machine"].items()) for run in runs)],
    }


def _summary(values: list[float | None]) -> dict[str, float | None]:
    """Describe the values that are defined."""
    return summary(value for value in values if value is not None)


def render(result: Mapping[str, Any]) -> str:
    """Return the page: one table of all networks, then one for each; every number is the result's."""
    settings, networks = result["settings"], result["networks"]
    held_out = settings["held_out_images"]
    opening = (
        f"Rank correlation of every criterion with the Oracle, the squared change of the loss when a channel alone is "
        f"removed; criteria and Oracle on {settings['images']} training images, and the Oracle once more on {held_out} "
        "test images. Mean ± standard deviation over seeds; best first."
    )
    page = ["# Criteria against the Oracle", "", opening, "", "## Spearman's coefficient, all networks", ""]
    methods = list(dict.fromkeys(method for found in networks.values() for method in found["criteria"]))

    def over_networks(method: str) -> float:
        means = [found["criteria"][method]["spearman"]["mean"] for found in networks.values()]
        return -math.inf if None in means else sum(means) / len(means)

    page += _table(
        ["criterion", *networks],
        [
            [method, *(mean_and_sd(found["criteria"][method]["spearman"], 3) for found in networks.values())]
            for method in sorted(methods, key=over_networks, reverse=True)
        ],
    )
    for network, found in networks.items():
        page += ["", f"## {network}", ""]
        dense = settings["dense"][network]
        judged = f", {found['judged']} of them judged" if found["judged"] < found["channels"] else ""
        of_size = f" at {dense['img_size']} x {dense['img_size']}" if dense["img_size"] else ""
        oracle, agreed = mean_and_sd(found["oracle_seconds"], 1), mean_and_sd(found["agreement"], 3)
        page += [
            f"{dense['dataset']}{of_size}, {dense['epochs']} epoch{'s' * (dense['epochs'] != 1)}: top-1 "
            f"{mean_and_sd(found['top1'])} % ({found['top1']['n']} seeds). {found['channels']} coupled channels in "
            f"{found['groups']} groups{judged}; Oracle {oracle} s; agreement {agreed}.",
            "",
        ]
        shown = {heading: column for heading, column in _SHOWN.items() if held_out or heading != "held out"}
        page += _table(
            ["criterion", *shown],
            [
                [method, *(mean_and_sd(row[column], 3) for column in shown.values())]
                for method, row in sorted(found["criteria"].items(), key=_spearman, reverse=True)
            ],
        )
        if found["skipped"]:
            page += ["", *(f"- {method} left out: {reason}" for method, reason in found["skipped"].items())]
    return "\n".join([*page, "", "Notes:", "", *(f"- {text}" for text in NOTES), ""])


def _spearman(item: tuple[str, Mapping[str, Any]]) -> float:
    mean = item[1]["spearman"]["mean"]
    return -math.inf if mean is None else float(mean)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
