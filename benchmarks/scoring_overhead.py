"""What scoring costs: Taylor-FO's update beside the forward and backward pass that it reads from.

The floor is one forward and backward pass. Both are timed in turns on the same minibatch, so that the ratio holds
on a machine whose speed drifts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import TaylorFO
from nni_plugin.networks import NETWORKS

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20, 64 x 3 x 28 x 28": (NETWORKS["resnet20"], (64, 3, 28, 28)),
    "vgg19_bn, 32 x 3 x 32 x 32": (NETWORKS["vgg19_bn"], (32, 3, 32, 32)),
    "mobilenetv2_cifar, 32 x 3 x 32 x 32": (NETWORKS["mobilenetv2_cifar"], (32, 3, 32, 32)),
    "timm resnet50, 16 x 3 x 64 x 64": (lambda: timm.create_model("resnet50", num_classes=10), (16, 3, 64, 64)),
    "timm densenet121, 16 x 3 x 64 x 64": (lambda: timm.create_model("densenet121", num_classes=10), (16, 3, 64, 64)),
}
GATES = ("auto", "weight", "input")


def run(rounds: int = 9) -> dict[str, Any]:
    """Measure every case; returns medians in ms and the share that an update adds (0.1 = 10 %)."""
    torch.manual_seed(0)
    return {"seed": 0, "rounds": rounds, "cases": {name: _measure(*case, rounds) for name, case in CASES.items()}}


def _measure(build: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    model, images = build(), torch.randn(shape)
    labels = torch.randint(0, 10, shape[:1])
    groups = [group for group in find_groups(model, images[:1]) if group.fixed is None]

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()

    result: dict[str, Any] = {}
    for gates in GATES:
        criterion = TaylorFO(gates)  # type: ignore[arg-type]
        with criterion.collect(model, groups):
            passes()
            criterion.update()
            floors, updates = [], []
            for _ in range(rounds):
                floors.append(_time(passes))
                updates.append(_time(criterion.update))
        floor, update = statistics.median(floors), statistics.median(updates)
        ratio = statistics.median(u / f for u, f in zip(updates, floors, strict=True))
        result[gates] = {"forward_backward_ms": floor, "update_ms": update, "share": ratio}
    return result


def _time(call: Callable[[], None]) -> float:
    return 1e3 * Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).timeit(3).median
