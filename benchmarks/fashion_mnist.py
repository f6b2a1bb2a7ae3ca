"""The main job on Fashion-MNIST: three networks to half their MACs by Taylor-FO, pruned while they are fine-tuned.

Each is trained for three epochs, then pruned iteratively and fine-tuned for two: about ten minutes a network on two
cores. The data are the four IDX files, as Debian's package `dataset-fashion-mnist` installs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def run() -> dict[str, Any]:
    """Run the three; returns the command and the content of `metrics.json` of each."""
    results = {}
    for name, network in NETWORKS.items():
        command = f"prune {network} {SETTINGS}"
        with tempfile.TemporaryDirectory() as folder:
            program = Path(sys.executable).with_name("nni-plugin")
            subprocess.run([program, *command.split(), "--data-dir", DATA_DIR, "--output", folder], check=True)
            metrics = json.loads((Path(folder) / "metrics.json").read_text())
        results[name] = {"command": f"nni-plugin {command} --data-dir D --output O", "metrics": metrics}
    return {"networks": results}
