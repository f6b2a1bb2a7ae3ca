"""Accuracy after removing many channels together, without any fine-tuning: Optimal Brain Surgeon against the rest.

Correlation with the Oracle is not accuracy after joint removal. Each method plans from the same training images, in
regimes that treat all methods alike: everything in one step (`one-shot`); the same, then each layer's weights solved
anew by least squares (`reconstructed`); ten steps with fresh scores and batch normalisation estimated anew after
each (`gradual`); and both (`gradual-reconstructed`). What is left is tested as it is.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.training import evaluate
from nni_plugin.benchmarks import earlier
from nni_plugin.benchmarks.experiment import Experiment
from nni_plugin.benchmarks.grid import summary
from nni_plugin.benchmarks.joint_removal.methods import LOSSES, METHODS, REGIMES, VARIANTS, rank
from nni_plugin.benchmarks.joint_removal.page import render
from nni_plugin.benchmarks.presets import DENSE
from nni_plugin.budgets import Budget, Channels, MACs
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import OutputError
from nni_plugin.methods import create_criterion
from nni_plugin.planner import plan_channels, unchanged
from nni_plugin.reconstruction import reconstruct
from nni_plugin.schedules import Gradual, OneShot

__all__ = ["render", "run"]


def run(
    networks: tuple[str, ...] = tuple(DENSE),
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] = (0, 1, 2),
    macs: tuple[float, ...] = (0.75, 0.5, 0.25),
    channels: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5),
    regimes: tuple[str, ...] = REGIMES,
    images: int = 2000,
    test_images: int = 10_000,
    folder: Path = Path("out/joint_removal"),
    data_dir: Path | None = None,
    gather: bool = False,
    onto: Path | None = None,
) -> dict[str, Any]:
    """Fill the grid, going on where it was; returns settings, and mean and sd over seeds of the test top-1.

    Args:
        networks: Of `nni_plugin.networks`.
        methods: Method names, or names in `methods.VARIANTS`.
        seeds: Of the dense networks' training and of the images.
        macs: Fractions of MACs kept.
        channels: Fractions of channels kept.
        regimes: Of `methods.REGIMES`.
        images: Training images that the methods see.
        test_images: Test images that top-1 is taken on.
        folder: For the dense networks and one file a run.
        data_dir: Folder of the data.
        gather: Run nothing: sum up all runs of these networks, images and test images that the folder holds.
        onto: An earlier result whose cells stay where there are none here: for a folder that holds but some of them.

    Raises:
        OutputError: The earlier result has other settings, or more seeds of a cell than there are here.
    """
    budgets: list[Budget] = [*(MACs(ratio) for ratio in macs), *(Channels(float(ratio)) for ratio in channels)]
    asked = {"images": images, "test_images": test_images}
    records = []
    for network in networks:
        study = Experiment(DENSE[network], folder / network, data_dir=data_dir, network=network)
        if gather:
            records += [{"network": network, **record} for record in _held(study.folder, asked)]
            continue
        for seed in seeds:
            study.base(seed)
            cell = _Cell(study, seed, images, test_images)
            for method in methods:
                for budget in budgets:
                    for regime in regimes:
                        name = f"{regime}/seed{seed}/{method.replace(':', '_')}-{_label(budget)}"
                        record = study.grid.run(name, cell.work(method, regime, budget), asked)
                        records.append({"network": network, "seed": seed, **record})
    settings = {**asked, "dense": {network: DENSE[network].training() for network in networks}}
    before, cells = earlier.read(onto), _cells(records)
    if before is not None:
        settings, cells = _joined(before, settings, cells)
    return {"earlier": earlier.calls(before), "settings": settings, "cells": cells}


def _joined(
    before: dict[str, Any], settings: dict[str, Any], cells: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return settings and cells of an earlier result with new ones in their places."""
    dense = {**before["settings"]["dense"], **settings["dense"]}
    if dense != {**settings["dense"], **before["settings"]["dense"]}:
        raise OutputError("The dense networks of the earlier result were trained otherwise.")
    if {**before["settings"], "dense": dense} != {**settings, "dense": dense}:
        raise OutputError("The earlier result is of other numbers of images.")
    joined = {_key(cell): cell for cell in before["cells"]}
    for cell in cells:
        missing = {*joined.get(_key(cell), cell)["seeds"]} - {*cell["seeds"]}
        if missing:
            raise OutputError(
                f"The earlier result has {' '.join(_key(cell))} with seed {min(missing)} too: run it with that seed."
            )
        joined[_key(cell)] = cell
    networks = list(dense)
    order = sorted(joined.values(), key=lambda cell: (networks.index(cell["network"]), rank(cell["method"])))
    return {**settings, "dense": dense}, order


def _key(of: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return what names the cell of a record or cell."""
    return of["network"], of["regime"], of["method"], of["target"]


def _held(folder: Path, asked: dict[str, int]) -> list[dict[str, Any]]:
    """Return the records of all finished runs in a network's folder."""
    records = []
    for path in sorted(path for regime in REGIMES for path in folder.glob(f"{regime}/seed*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if all(content["settings"][name] == value for name, value in asked.items()):
            records.append({"seed": int(path.parent.name.removeprefix("seed")), **content["result"]})
    return sorted(records, key=lambda record: rank(record["method"]))


class _Cell:
    """One dense network with its images, loaded when the first run asks."""

    def __init__(self, study: Experiment, seed: int, images: int, test_images: int) -> None:
        self.study, self.seed, self.images, self.test_images = study, seed, images, test_images
        self._planned: tuple[Any, Any, float] = None, None, 0.0  # shared by regimes that differ in what comes after
        self._loaded: tuple[nn.Module, list[Any], list[Any], float] | None = None

    def load(self) -> tuple[nn.Module, list[Any], list[Any], float]:
        """Return the network, minibatches to score on, minibatches to test on, and the dense top-1."""
        if self._loaded is None:
            data = self.study.data(self.seed)
            model = self.study.trained_base(self.seed).eval()
            score, test = first(data.score, self.images, self.seed), first(data.test, self.test_images)
            self._loaded = model, score, test, evaluate(model, test, torch.device("cpu"))["top1"]
        return self._loaded

    def work(self, method: str, regime: str, budget: Budget) -> Any:
        """Return the work of one run, for the grid."""

        def do(_: Path) -> dict[str, Any]:
            model, score, test, dense = self.load()
            criterion = VARIANTS[method]() if method in VARIANTS else create_criterion(method)
            gradual, begun = regime.startswith("gradual"), time.perf_counter()
            if self._planned[0] != (method, gradual, budget):
                with unchanged(model):
                    plan = plan_channels(
                        model,
                        score[0][0][:2],
                        criterion,
                        score,
                        LOSSES.get(method, cross_entropy),
                        budget,
                        schedule=Gradual(10) if gradual else OneShot(),
                        reestimate=gradual,
                    )
                self._planned = (method, gradual, budget), plan, time.perf_counter() - begun
            plan, begun = self._planned[1], time.perf_counter()
            pruned = copy.deepcopy(model)
            plan.apply(pruned, score[0][0][:2])
            if regime.endswith("reconstructed"):
                reconstruct(pruned, model, score[0][0][:2], score, lambda network, batch: network(batch[0]))
            elif gradual:
                reestimate_batchnorm(pruned, score, cross_entropy)
            seconds = self._planned[2] + time.perf_counter() - begun
            before, after = (count(net, score[0][0][:1]) for net in (model, pruned))
            return {
                "method": method,
                "regime": regime,
                "target": _label(budget),
                "top1_dense": dense,
                "top1": evaluate(pruned, test, torch.device("cpu"))["top1"],
                "macs_ratio": after.macs / before.macs,
                "params_ratio": after.params / before.params,
                "channels_kept": plan.channels_kept / (plan.channels_kept + plan.channels_removed),
                "steps": plan.provenance["steps"],
                "seconds": seconds,
            }

        return do


def first(loader: Any, images: int, seed: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return the first images of a loader as minibatches of 100, or as many drawn by a seed."""
    inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    chosen = torch.arange(len(inputs))
    if seed is not None:
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    chosen = chosen[:images]
    return list(zip(inputs[chosen].split(100), labels[chosen].split(100), strict=True))


def _label(budget: Budget) -> str:
    ratio = budget.ratio if isinstance(budget, MACs) else budget.count  # type: ignore[union-attr]
    return f"{type(budget).__name__.lower()}{ratio:g}"


def _cells(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and sd over seeds for each network, regime, method and target."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(_key(record), []).append(record)
    names = ("network", "regime", "method", "target")
    values = ("top1", "top1_dense", "macs_ratio", "params_ratio", "channels_kept", "seconds")
    for of_key in groups.values():
        of_key.sort(key=lambda record: int(record["seed"]))
    return [
        {
            **dict(zip(names, key, strict=True)),
            "seeds": [record["seed"] for record in of_key],
            **{value: summary(record[value] for record in of_key) for value in values},
        }
        for key, of_key in groups.items()
    ]
