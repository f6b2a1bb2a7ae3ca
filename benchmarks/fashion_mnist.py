"""The main job on Fashion-MNIST: three networks to half their MACs by Taylor-FO, pruned while they are fine-tuned.

Each is trained for three epochs, then pruned iteratively and fine-tuned for two: about ten minutes a network on two
cores. The data are the four IDX files, as Debian's package `dataset-fashion-mnist` installs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_plugin.benchmarks.grid import Grid

DATA_DIR = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
"""Folder of the four files; the environment variable `FASHION_MNIST` names another."""

NETWORKS = {
    "resnet20": "--library nni_plugin --model resnet20",
    "timm_resnet18": "--library timm --model resnet18 --img-size 32",
    "torchvision_mobilenet_v2": "--library torchvision --model mobilenet_v2 --img-size 32",
}
SETTINGS = (
    "--dataset torch/fashion_mnist --method taylor-fo --macs 0.5 --schedule iterative --pretrain-epochs 3 --epochs 2"
)


def run(networks: tuple[str, ...] = tuple(NETWORKS), folder: Path = Path("out/fashion_mnist")) -> dict[str, Any]:
    """Run those that have not been run; returns the command and the content of `metrics.json` of each.

    Args:
        networks: Names in `NETWORKS`.
        folder: For one file a network, so that a killed benchmark goes on.
    """
    results = {}
    for name in networks:
        command = f"prune {NETWORKS[name]} {SETTINGS}"
        results[name] = {
            "command": f"nni-plugin {command} --data-dir D --output O",
            "metrics": Grid(folder, {"command": command}).run(name, _Prune(command)),
        }
    return {"networks": results}


@dataclass(frozen=True)
class _Prune:
    """The work of one network."""

    command: str

    def __call__(self, state: Path) -> dict[str, Any]:
        program, output = Path(sys.executable).with_name("nni-plugin"), state / "output"
        options = ["--data-dir", str(DATA_DIR), "--output", str(output)]
        if output.exists():
            options.append("--resume")
        subprocess.run([program, *self.command.split(), *options], check=True)
        metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
        return metrics
