"""Channels, whole blocks, or both in one plan, under the same measured latency and without any fine-tuning.

Each method plans from the same training images until the network, timed in turns with the dense one, is within the
budget. Then all are treated alike: statistics of batch normalisations estimated anew, or the weights of each layer
solved anew by least squares. What is left is tested as it is, and its latency measured once more.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.training import evaluate
from nni_plugin.benchmarks.experiment import Experiment
from nni_plugin.benchmarks.grid import mean_and_sd, summary
from nni_plugin.benchmarks.joint_removal import first
from nni_plugin.benchmarks.presets import DENSE
from nni_plugin.budgets import Latency
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.latency import measure_pair
from nni_plugin.layer_planner import plan_layers
from nni_plugin.layers.methods import LAYER_METHODS, create_layer_importance
from nni_plugin.methods import create_criterion
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import plan_channels
from nni_plugin.reconstruction import reconstruct
from nni_plugin.schedules import Gradual, OneShot
from nni_plugin.width_and_depth import plan_jointly

METHODS = ("obs-joint", "obs", "taylor-fo", "imprinting", "layer-taylor-fo", "block-gate")
KINDS = {"obs-joint": "both", "obs": "channels", "taylor-fo": "channels"}


def run(
    networks: tuple[str, ...] = ("resnet20", "resnet56"),
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0, 1, 2),
    latency: tuple[float, ...] = (0.75, 0.6, 0.45),
    batch_size: int = 1,
    images: int = 1000,
    test_images: int = 5000,
    steps: int = 5,
    folder: Path = Path("out/joint_removal"),
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Fill the grid, going on where it was; returns settings, and mean and sd over seeds of the test top-1.

    Args:
        networks: Of `benchmarks.presets.DENSE`.
        methods: `obs-joint`, methods for channels, methods for layers.
        seeds: Of the dense networks' training and of the images.
        latency: Fractions of the dense network's latency kept.
        batch_size: Images in a timed pass.
        images: Training images that the methods see.
        test_images: Test images that top-1 is taken on.
        steps: Steps of `obs` and `obs-joint` to the budget, on fresh gradients.
        folder: For the dense networks and one file a run.
        data_dir: Folder of the data.
    """
    asked = {
        "images": images,
        "test_images": test_images,
        "batch_size": batch_size,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }
    records = []
    for network in networks:
        study = Experiment(DENSE[network], folder / network, data_dir=data_dir, network=network)
        for seed in seeds:
            study.base(seed)
            cell = _Cell(study, seed, asked)
            for ratio in latency:
                for method in methods:
                    name = f"width_and_depth/seed{seed}/{method}-{ratio:g}-batch{batch_size}"
                    record = study.grid.run(name, cell.work(method, Latency(ratio, batch_size=batch_size)), asked)
                    records.append({"network": network, "seed": seed, "latency": ratio, **record})
    return {
        "settings": {**asked, "dense": {network: DENSE[network].training() for network in networks}},
        "cells": _cells(records),
    }


class _Cell:
    """One dense network with its images, loaded when the first run asks."""

    def __init__(self, study: Experiment, seed: int, asked: dict[str, int]) -> None:
        self.study, self.seed, self.asked = study, seed, asked
        self._loaded: tuple[nn.Module, list[Any], list[Any], float] | None = None

    def load(self) -> tuple[nn.Module, list[Any], list[Any], float]:
        """Return the network, minibatches to plan on, minibatches to test on, and the dense top-1."""
        if self._loaded is None:
            data = self.study.data(self.seed)
            model = self.study.trained_base(self.seed).eval()
            score, test = (
                first(data.score, self.asked["images"], self.seed),
                first(data.test, self.asked["test_images"]),
            )
            self._loaded = model, score, test, evaluate(model, test, torch.device("cpu"))["top1"]
        return self._loaded

    def work(self, method: str, budget: Latency) -> Any:
        """Return the work of one run, for the grid."""

        def do(_: Path) -> dict[str, Any]:
            model, score, test, dense = self.load()
            images: Tensor = score[0][0][:2]
            begun = time.perf_counter()
            plan = plan_for(method, model, images, score, budget, self.asked["steps"])
            seconds = time.perf_counter() - begun
            settled = plan.apply(copy.deepcopy(model), images)
            solved = copy.deepcopy(settled)
            reestimate_batchnorm(settled, score, cross_entropy)
            reconstruct(solved, model, images, score, lambda network, batch: network(batch[0]))
            shape = (images.shape[1], images.shape[2], images.shape[3])
            [pair] = measure_pair(model, settled, shape, (budget.batch_size,), min_run_time=2.0)
            before, after = count(model, images), count(settled, images)
            return {
                "method": method,
                "top1_dense": dense,
                "top1_settled": evaluate(settled, test, torch.device("cpu"))["top1"],
                "top1_reconstructed": evaluate(solved, test, torch.device("cpu"))["top1"],
                "latency_ratio": pair.ratio,
                "latency_ms": pair.second.median_ms,
                "macs_ratio": after.macs / before.macs,
                "params_ratio": after.params / before.params,
                "blocks": list(plan.removed_blocks),
                "blocks_removed": len(plan.removed_blocks),
                "channels_removed": plan.channels_removed,
                "predicted_loss_change": plan.predicted_loss_change,
                "seconds": seconds,
            }

        return do


def plan_for(
    method: str, model: nn.Module, images: Tensor, score: Sequence[Any], budget: Latency, steps: int
) -> PruningPlan:
    """Return a method's plan for a network, which is as it was afterwards."""
    if method == "obs-joint":
        return plan_jointly(model, images, score, cross_entropy, budget, steps=steps)
    if method in LAYER_METHODS:
        return plan_layers(model, images, create_layer_importance(method), score, budget)
    schedule = Gradual(steps) if method == "obs" else OneShot()
    return plan_channels(model, images, create_criterion(method), score, cross_entropy, budget, schedule=schedule)


VALUES = (
    "top1_settled", "top1_reconstructed", "top1_dense", "latency_ratio", "macs_ratio", "params_ratio",
    "blocks_removed", "channels_removed", "seconds",
)  # fmt: skip


def _cells(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and sd over seeds for each network, latency and method."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["network"], record["latency"], record["method"]), []).append(record)
    return [
        {
            **dict(zip(("network", "latency", "method"), key, strict=True)),
            "seeds": [record["seed"] for record in of_key],
            **{value: summary(record[value] for record in of_key) for value in VALUES},
            "blocks": [record["blocks"] for record in of_key],
        }
        for key, of_key in groups.items()
    ]


def render(result: dict[str, Any]) -> str:
    """Return the page: one table a network, by latency and method."""
    asked, cells = result["settings"], result["cells"]
    text = [
        "# Width, depth, or both under one latency",
        "",
        f"Test top-1 in percent on {asked['test_images']} images of Fashion-MNIST without any fine-tuning; every "
        f"method sees the same {asked['images']} training images and stops at the same latency, measured on the slim "
        f"network in turns with the dense one (batch {asked['batch_size']}, float32, {asked['threads']} CPU "
        f"thread{'s' * (asked['threads'] != 1)}). Mean and standard deviation over seeds, each a dense network of its "
        "own; a number without deviation is of one seed. *settled*: statistics of batch normalisations estimated anew. "
        "*reconstructed*: each layer's weights solved anew by least squares. Latency and MACs are the parts kept.",
    ]
    for network in dict.fromkeys(cell["network"] for cell in cells):
        rows = [cell for cell in cells if cell["network"] == network]
        text += [
            "",
            f"## {network}",
            "",
            f"Dense: {mean_and_sd(rows[0]['top1_dense'])}; seeds {', '.join(map(str, rows[0]['seeds']))}.",
            "",
            "| asked | method | removes | settled | reconstructed | latency | MACs | blocks gone | channels gone |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            kept = (f"{row[name]['mean']:.3f}" for name in ("latency_ratio", "macs_ratio"))
            gone = (f"{row[name]['mean']:.1f}" for name in ("blocks_removed", "channels_removed"))
            text.append(
                f"| {row['latency']:g} | `{row['method']}` | {KINDS.get(row['method'], 'blocks')} | "
                + " | ".join([mean_and_sd(row["top1_settled"]), mean_and_sd(row["top1_reconstructed"]), *kept, *gone])
                + " |"
            )
    return "\n".join(text) + "\n"
