"""Inference speed of pruned ResNets: Table 5 of the Taylor paper, four ways of running them.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, supplement 6.2, Table 5. ResNet-101 and
ResNet-50 with random weights are pruned to the MACs of the paper's networks by several layouts of widths
(:mod:`.layouts`) and timed beside the dense network, all in turns (:mod:`.turns`), at each batch size in each way of
running them (:mod:`.ways`). Accuracy is not in question: only shapes decide how long a pass takes.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision

from nni_plugin.benchmarks.grid import Grid
from nni_plugin.benchmarks.inference_speed.layouts import LAYOUTS, Variant, variants
from nni_plugin.benchmarks.inference_speed.page import plot, render
from nni_plugin.benchmarks.inference_speed.table5 import TABLE5, goals_of
from nni_plugin.benchmarks.inference_speed.turns import measure_in_turns
from nni_plugin.benchmarks.inference_speed.ways import WAYS, cold_compiler, missing, prepare
from nni_plugin.errors import BudgetError, ModelError
from nni_plugin.machine import describe_machine, usable_device

__all__ = ["plot", "render", "run"]

NETWORKS = ("resnet101", "resnet50")
BATCHES = {"cpu": (1, 16), "cuda": (16, 256)}
"""Images in a pass, by device; those of the paper on GPUs."""

_SCORED = 4
"""Images that batch normalisations and scores see."""


def run(
    networks: tuple[str, ...] = NETWORKS,
    ways: tuple[str, ...] = tuple(WAYS),
    layouts: tuple[str, ...] = tuple(LAYOUTS),
    devices: tuple[str, ...] | None = None,
    batches: tuple[int, ...] | None = None,
    size: int = 224,
    rounds: int = 9,
    min_run_time: float = 3.0,
    threads: int = 1,
    seed: int = 0,
    folder: Path = Path("out/inference_speed"),
) -> dict[str, Any]:
    """Time every network in every way; a killed call goes on with the next network, batch and way.

    Args:
        networks: Names of torchvision; random weights.
        ways: eager, channels-last, compile, onnx.
        layouts: even, even-8, fitted, taylor-fo.
        devices: cpu, cuda; all that are here if not given.
        batches: Images in a pass; if not given 1 and 16 on the CPU, 16 and 256 on CUDA.
        size: Height and width of the images.
        rounds: Turns of each network, at least 3.
        min_run_time: Seconds to time each network, about; more where one pass a turn takes longer.
        threads: CPU threads of every way.
        seed: Of weights, images and labels.
        folder: For what is measured, one file for each network, device, batch and way.

    Raises:
        BudgetError: A name of a layout is unknown, or a goal cannot be met.
        ModelError: A name of a network or way is unknown, or a network does not run in a way.
    """
    _check("layout", layouts, LAYOUTS, BudgetError)
    _check("way", ways, WAYS, ModelError)
    _check("network", networks, torchvision.models.list_models(module=torchvision.models), ModelError)
    places = [usable_device(name) for name in devices or (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))]
    machine = describe_machine()
    asked = {
        **{"size": size, "seed": seed, "layouts": list(layouts), "dtype": "float32", "threads": threads},
        **{"rounds": rounds, "min_run_time": min_run_time},
        "versions": {name: machine[name] for name in ("torch", "torchvision")} | _versions(),
        **{name: machine[name] for name in ("CPU", "GPU")},
    }
    grid = Grid(Path(folder), asked)
    about, cells, left_out = dict[str, Any](), list[dict[str, Any]](), dict[str, str]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in networks:
            network = _Network(name, asked, grid)
            about[name] = network.about()
            for device in places:
                for batch in batches or BATCHES.get(device.type, BATCHES["cuda"]):
                    for way in ways:
                        if reason := missing(way, device):
                            left_out[f"{way} on {device}"] = reason
                        else:
                            cells.append(network.timed(device, batch, way))
    finally:
        torch.set_num_threads(before)
    return {
        "settings": asked,
        "networks": about,
        "cells": cells,
        "left_out": left_out,
        "goals": {name: [asdict(goal) for goal in goals_of(name)] for name in networks},
        "table5": [asdict(row) for row in TABLE5],
    }


class _Network:
    """A network and all that is made of it, made when the first run asks."""

    def __init__(self, name: str, asked: Mapping[str, Any], grid: Grid) -> None:
        self.name, self.asked, self.grid = name, asked, grid

    @functools.cached_property
    def made(self) -> list[Variant]:
        torch.manual_seed(self.asked["seed"])
        dense = torchvision.models.get_model(self.name, weights=None)
        images = torch.randn(_SCORED, 3, self.asked["size"], self.asked["size"])
        return variants(dense, goals_of(self.name), self.asked["layouts"], images, self.asked["seed"])

    def about(self) -> list[dict[str, Any]]:
        """Return goal, layout, MACs, parameters and widths of every network."""

        def do(_: Path) -> dict[str, Any]:
            return {"variants": [{"goal": v.goal, "layout": v.layout, **v.about} for v in self.made]}

        found: list[dict[str, Any]] = self.grid.run(f"{self.name}/widths", do)["variants"]
        return found

    def timed(self, device: torch.device, batch: int, way: str) -> dict[str, Any]:
        """Return the times of all networks, which take turns, at one batch in one way."""
        threads = self.asked["threads"]

        def do(_: Path) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(self.asked["seed"])
            images = torch.randn(batch, 3, self.asked["size"], self.asked["size"], generator=generator).to(device)
            torch.compiler.reset()  # nothing of an earlier batch
            with cold_compiler():
                ready = [prepare(way, variant.network.to(device), images, threads) for variant in self.made]
            with torch.inference_mode():
                timings = measure_in_turns(
                    [network.run for network in ready],
                    rounds=self.asked["rounds"],
                    min_run_time=self.asked["min_run_time"],
                )
            return {
                "timed": [
                    {
                        **{"goal": variant.goal, "layout": variant.layout, **asdict(timing)},
                        **{"seconds_to_prepare": network.seconds, "difference": network.difference},
                    }
                    for variant, network, timing in zip(self.made, ready, timings, strict=True)
                ]
            }

        name = f"{self.name}/{str(device).replace(':', '')}-batch{batch}-{way}"
        return {"network": self.name, "device": str(device), "batch": batch, "way": way, **self.grid.run(name, do)}


def _versions() -> dict[str, str]:
    """Return the versions that the ways depend on, beside torch's own."""
    try:
        runtime = importlib.import_module("onnxruntime").__version__  # its distribution has several names
    except ImportError:
        runtime = "not installed"
    compiler = os.environ.get("CXX", "g++")
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        said = ""
    name = (said.splitlines() or [f"{compiler}: none"])[0]
    return {"onnxruntime": runtime, "C++ compiler": name, "CPU kernels": torch.backends.cpu.get_cpu_capability()}


def _check(what: str, given: Sequence[str], known: Sequence[str] | Mapping[str, Any], error: type[Exception]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise error(f"Expected at least one {what} of {', '.join(known)}; got {', '.join(unknown) or 'none'}.")
