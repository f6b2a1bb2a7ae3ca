"""What Optimal Brain Surgeon takes beside the passes over the data, on networks with many gates: seconds and memory.

Gate counts are those of the networks; gradients are drawn at random with the rank that so many samples give, for the
work depends on their shape alone. All gates are put in their order of removal, which is more than any budget asks, and
the factors are solved with half of them gone. Every measurement has a process of its own; its memory is the highest
resident memory less what the gradients and the process held before.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import timm
import torch

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.benchmarks.process_memory import MEBI, highest, in_a_process, resident
from nni_plugin.criteria import quadratic

NETWORKS = ("resnet18", "resnet50", "densenet121", "vit_small_patch16_224", "vit_base_patch16_224")

_PROGRAM = "nni_plugin.benchmarks.obs_scale"


def run(networks: tuple[str, ...] = NETWORKS, samples: int = 2000, threads: int = 2) -> dict[str, Any]:
    """Measure every network once.

    Args:
        networks: Names of timm.
        samples: Rows of gate gradients.
        threads: Of the linear algebra.
    """
    cases = {name: in_a_process(_PROGRAM, (gates(name), samples, threads), threads) for name in networks}
    return {"settings": {"samples": samples, "threads": threads, "damping": 0.1}, "cases": cases}


def gates(network: str) -> int:
    """Return the number of joint gates of a network of timm."""
    model = timm.create_model(network).eval()
    return sum(group.width for group in find_groups(model, torch.randn(1, 3, 224, 224)) if group.fixed is None)


def measure(gates: int, samples: int) -> dict[str, float]:
    """Order all gates and solve for the factors; returns seconds, MiB, and the MiB of the gradients themselves."""
    torch.manual_seed(0)
    gradients = torch.randn(samples, gates)
    before, begun = resident(), time.perf_counter()
    order = quadratic.removal_order(gradients, 0.1)
    ordered, begun = time.perf_counter() - begun, time.perf_counter()
    removed = torch.zeros(gates, dtype=torch.bool)
    removed[order[: gates // 2]] = True
    quadratic.Compensation(gradients, removed)(0.1)
    return {
        "gates": gates,
        "seconds_order": ordered,
        "seconds_factors": time.perf_counter() - begun,
        "mib": (highest() - before) / MEBI,
        "mib_gradients": gradients.numel() * 4 / MEBI,
    }


def render(result: dict[str, Any]) -> str:
    """Return the page."""
    asked = result["settings"]
    lines = [
        "# Optimal Brain Surgeon on many gates",
        "",
        "Beside the passes over the data: all gates in their order of removal, and the factors with half of them gone; "
        f"{asked['samples']} samples, {asked['threads']} threads, CPU, once each. Gates are those of the network, "
        "gradients are random.",
        "",
        "| network of timm | gates | order, s | factors, s | memory, MiB | gradients, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, case in result["cases"].items():
        lines.append(
            f"| {name} | {case['gates']} | {case['seconds_order']:.1f} | {case['seconds_factors']:.1f} "
            f"| {case['mib']:.0f} | {case['mib_gradients']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
