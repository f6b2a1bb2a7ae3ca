"""LayerPrune's experiments: whole layers against filters, at equal latency and before and after fine-tuning.

Elkerdawy et al., "To Filter Prune, or to Layer Prune, That Is the Question", ACCV 2020, arXiv 2007.05667, supplement:

    t1  filters by criterion, removed iteratively or at once
    t2  blocks by Imprinting, ranked once or anew after each removal
    t3  VGG-19: layers by Imprinting, filters at equal latency, and the architectures
    t5  networks without their least important blocks, fine-tuned or trained from scratch
    f1  accuracy against latency for filters and for layers, by method

Figures 2 to 4, the importance of every block by every criterion, are drawn by `nni-plugin layers`. Beside every network
stands the dense one, fine-tuned alike: short training alone may better a network that was trained briefly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from nni_plugin.benchmarks.grid import summary
from nni_plugin.benchmarks.layerprune.figure import plot
from nni_plugin.benchmarks.layerprune.page import render
from nni_plugin.benchmarks.layerprune.presets import FULL, numbers_of
from nni_plugin.benchmarks.layerprune.study import NotDoneError, Study
from nni_plugin.benchmarks.layerprune.tables import Row, control, figure1, table1, table2, table3, table5
from nni_plugin.benchmarks.presets import reductions
from nni_plugin.errors import DataError
from nni_plugin.layers.methods import create_layer_importance
from nni_plugin.methods import METHODS as OF_CHANNELS

__all__ = ["plot", "render", "run"]

NETWORKS = {
    "t1": ("resnet56",),
    "t2": ("resnet56",),
    "t3": ("vgg19_bn",),
    "t5": ("resnet56",),
    "f1": ("resnet56", "vgg19_bn"),
}
"""The networks of each experiment."""

LABELS = {
    "control": (),
    "t1": ("method", "share", "way"),
    "t2": ("n", "way"),
    "t3": ("method", "goal"),
    "t5": ("n",),
    "f1": ("method", "asked"),
}
"""What tells the rows of an experiment apart, besides network and seed."""

VALUES = (
    "top1", "top1_before", "top1_minus_control", "top1_dense", "top1_between", "top1_scratch", "top1_minus_scratch",
    "spearman", "macs_ratio", "params_ratio", "latency_1", "latency_64", "ms_1", "ms_64", "channels_removed",
    "planning_seconds", "seconds",
)  # fmt: skip

METHODS = (
    "taylor-fo", "magnitude", "bn-scale", "obs",
    "imprinting", "layer-taylor-fo", "layer-ensemble", "block-gate",
)  # fmt: skip

NOTES = (
    "Before fine-tuning: statistics of batch normalisations estimated anew on the images that the criteria see.",
    "Dense, fine-tuned: the whole network after the same fine-tuning; differences are against it, seed by seed.",
    "Importance and its rankings are from training images; test images are read for the accuracies shown alone, of "
    "the last epoch. The authors measure the proxies of Imprinting on the test set.",
    "The dense networks were trained on all training images, those that Imprinting's proxies are measured on too.",
    "Latency and MACs are the parts kept. Latencies are medians over rounds in which the pruned network takes turns "
    "with the dense one, without training between.",
    "The convolutions that change a ResNet's shape are 1x1 with BN; the blocks that hold them stay.",
    "t1: only the first convolution of every residual block loses filters, as in the authors' code. Iterative: a tenth "
    "of the filters each time, the first right after some minibatches of fine-tuning, which goes on to its end; "
    "one-shot: before it.",
    "t2: Spearman's coefficient over the blocks that are left, of the ranking made once and the one after the n-th "
    "removal. Iterative: fine-tuned after each removal, then ranked anew, as in the authors' code. 'Same training': "
    "its blocks removed at once and fine-tuned once, as in the other columns.",
    "t3 and f1: filters of all coupled channels, to the budget in five steps of fresh scores without training between; "
    "layers ranked once.",
    "t5: from scratch by the settings of the dense network's training. The paper's numbers are of ResNet-50 on "
    "ImageNet.",
    "Every fine-tuning sees the same images in the same order. Networks that lose the same blocks are one run.",
)


def run(
    experiments: tuple[Literal["t1", "t2", "t3", "t5", "f1"], ...] = ("t2", "t1", "t3", "t5", "f1"),
    preset: Literal["reduced", "full"] = "reduced",
    dataset: str | None = None,
    data_dir: Path | None = None,
    networks: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] | None = None,
    layers: int = 4,
    units: tuple[int, ...] = (2, 5),
    scratch: tuple[int, ...] = (1, 2, 3, 4),
    shares: tuple[float, ...] = (0.2, 0.3),
    methods: tuple[str, ...] = METHODS,
    latency: tuple[float, ...] = (0.85, 0.7, 0.55),
    latency_batch: Literal[1, 64] = 64,
    folder: Path = Path("out/layerprune"),
    dense: Path = Path("out/joint_removal"),
    device: str | None = None,
    collect: bool = False,
) -> dict[str, Any]:
    """Fill the grid of the experiments that are named, and return its summary; a killed call goes on.

    Args:
        experiments: Which ones.
        preset: `full` has the paper's numbers, `reduced` fewer; the result says which.
        dataset: `torch/cifar10`, `torch/cifar100`, `torch/fashion_mnist` ...; the preset's if not given.
        data_dir: Folder of the data; for Fashion-MNIST the environment variable FASHION_MNIST names it too.
        networks: Of `presets.DENSE`; those of each experiment if not given.
        seeds: Of the dense networks; as many as the preset says, from 0, if not given.
        layers: t2 removes 1, 2, ... so many blocks.
        units: t3 removes so many layers.
        scratch: t5 removes so many blocks.
        shares: Shares of filters that t1 removes.
        methods: Methods of f1, for channels and for layers.
        latency: Fractions of the latency that f1 keeps.
        latency_batch: Images in a pass whose latency t3 and f1 plan by.
        folder: For the runs.
        dense: For the dense networks; that of `joint_removal` has those of the reduced preset.
        device: cpu, cuda ...; the best there is if not given.
        collect: Run nothing, and sum up what is done.
    """
    for method in methods:
        if method not in OF_CHANNELS:
            create_layer_importance(method)  # a wrong name is told before hours of work
    chosen = {
        "t1": lambda study, seed: table1(study, seed, shares),
        "t2": lambda study, seed: table2(study, seed, layers),
        "t3": lambda study, seed: table3(study, seed, units, latency_batch),
        "t5": lambda study, seed: table5(study, seed, scratch),
        "f1": lambda study, seed: figure1(study, seed, methods, latency, latency_batch),
    }
    wanted = networks or tuple(dict.fromkeys(name for part in experiments for name in NETWORKS[part]))
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for network in wanted:
        numbers = numbers_of(preset, network, dataset)
        own = preset if preset == "reduced" and dataset is None else f"{preset}-{numbers.dataset.rpartition('/')[2]}"
        home = Path(dense) / network if own == "reduced" else Path(dense) / own / network
        study = Study(
            numbers, Path(folder) / own / network, home, network, data_dir=data_dir, device=device, collect=collect
        )
        parts = [part for part in experiments if networks is not None or network in NETWORKS[part]]
        for seed in seeds or range(numbers.seeds):
            rows += _filled("control", control(study, seed), network, seed)
            for part in parts:
                rows += _filled(part, chosen[part](study, seed), network, seed)
        settings[network] = {**asdict(numbers), "reductions": reductions(numbers, FULL)}
    if not rows:
        raise DataError(f"Nothing is done below {folder}: run without --collect first.")
    return {
        "preset": preset,
        "dataset": next(iter(settings.values()))["dataset"],
        "latency_batch": latency_batch,
        "settings": settings,
        "notes": list(NOTES),
        "measured_on": _places(rows),
        "cells": summarise(rows),
    }


def _filled(part: str, rows: Iterator[Row], network: str, seed: int) -> list[dict[str, Any]]:
    """Run or read rows one by one; those that are only to be read and are not there are left out."""
    found = []
    for labels, do in rows:
        try:
            found.append({"experiment": part, "network": network, "seed": seed, **labels, **do()})
        except NotDoneError:
            continue
    return found


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, deviation and interval over the seeds of every cell, with blocks and architectures by seed."""
    controls = {(row["network"], row["seed"]): row["top1"] for row in rows if row["experiment"] == "control"}
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        labels = tuple(row[name] for name in LABELS[row["experiment"]])
        groups.setdefault((row["experiment"], row["network"], *labels), []).append(row)
    cells = []
    for key, of_cell in groups.items():
        part, network, labels = key[0], key[1], key[2:]
        values = [_values(row, controls) for row in of_cell]
        told = {name: summary(v[name] for v in values if v.get(name) is not None) for name in VALUES}
        cells.append(
            {
                "experiment": part,
                "network": network,
                **dict(zip(LABELS[part], labels, strict=True)),
                "seeds": [row["seed"] for row in of_cell],
                **{name: value for name, value in told.items() if value["n"]},
                "blocks": [row.get("blocks") for row in of_cell],
                "architectures": [row.get("architecture") for row in of_cell],
                "refused": [row["refused"] for row in of_cell if "refused" in row],
            }
        )
    return cells


def _values(row: Mapping[str, Any], controls: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """Return the numbers of a row, differences and latencies among them."""
    found = {name: row.get(name) for name in VALUES}
    reference = controls.get((row["network"], row["seed"]))
    if found["top1"] is not None and reference is not None:
        found["top1_minus_control"] = found["top1"] - reference
    if found["top1_scratch"] is not None:
        found["top1_minus_scratch"] = row["top1"] - row["top1_scratch"]
    for size, pair in row.get("latency", {}).items():
        found[f"latency_{size}"], found[f"ms_{size}"] = pair["ratio"], pair["second"]["median_ms"]
    return found


def _places(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every machine, device, element type and number of threads that latencies were measured with."""
    places = []
    for row in rows:
        for pair in row.get("latency", {}).values():
            how = {name: pair["second"][name] for name in ("device", "dtype", "threads")}
            places.append(json.dumps({**how, "machine": row["machine"]}))
    return [json.loads(place) for place in dict.fromkeys(places)]
