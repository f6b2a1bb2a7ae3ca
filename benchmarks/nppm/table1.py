"""The choice of p for the networks of Table 1: computed, beside what the table has.

`p` is the fraction of the prunable MACs `T_total` that may stay; `T_all` is what the whole network costs. The
supplement (B) has `p = 0.5 T_all / T_total` for half of all; exact is `p = 1 - 0.5 T_all / T_total`, since what cannot
be pruned stays. Gates are where the authors' code has them: on the hidden channels of each block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.errors import BudgetError
from nni_plugin.networks import NETWORKS
from nni_plugin.performance import ArchitectureCost, ArchitectureLayout, gated_groups, kept_fraction


@dataclass(frozen=True)
class Entry:
    """A row of Table 1.

    Args:
        dataset: Whose images it takes.
        network: The paper's name.
        p: As printed.
        build: Makes the network; None where no library has it.
        size: Height and width of the images.
    """

    dataset: str
    network: str
    p: float
    build: Callable[[], nn.Module] | None
    size: int


def _of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None)


TABLE1 = (
    Entry("CIFAR-10", "ResNet-56", 0.50, NETWORKS["resnet56"], 32),
    Entry("CIFAR-10", "MobileNetV2", 0.55, NETWORKS["mobilenetv2_cifar"], 32),
    Entry("ImageNet", "ResNet-34", 0.50, _of_torchvision("resnet34"), 224),
    Entry("ImageNet", "ResNet-50", 0.38, _of_torchvision("resnet50"), 224),
    Entry("ImageNet", "ResNet-101", 0.42, _of_torchvision("resnet101"), 224),
    Entry("ImageNet", "MobileNetV2", 0.63, _of_torchvision("mobilenet_v2"), 224),
    Entry("ImageNet", "ShuffleNetV2+", 0.70, None, 224),
)

_HIDDEN = re.compile(r"layer\d\.\d+\.conv\d|blocks\.\d+\.expand\.0|features\.\d+\.conv\.0\.0")
"""Names of the groups of hidden channels, in the networks above."""


def choice_of_p(entry: Entry, ratio: float = 0.5) -> dict[str, Any]:
    """Return what a network's prunable MACs are, what p follows from a ratio, and what follows from the table's p.

    Args:
        entry: The row.
        ratio: Fraction of all MACs kept.

    Returns:
        `prunable`: `T_total / T_all`; `p_supplement` and `p_exact` (None where there is no such p) for the ratio;
        `p_table`, and `kept_at_table`: the fraction of all MACs that stay at it. Of a network that no library has
        `p_table` alone.
    """
    row: dict[str, Any] = {"dataset": entry.dataset, "network": entry.network, "p_table": entry.p}
    if entry.build is None:
        return row
    model = entry.build().eval()
    inputs = torch.zeros(1, 3, entry.size, entry.size)
    layout = ArchitectureLayout([g for g in gated_groups(find_groups(model, inputs)) if _HIDDEN.fullmatch(g.name)])
    cost = ArchitectureCost(model, inputs, layout).macs
    whole, prunable = cost.dense, cost.dense - cost.fixed

    def p(formula: Any) -> float | None:
        try:
            return kept_fraction(ratio, prunable, whole, formula)
        except BudgetError:
            return None

    return {
        **row,
        "macs": whole,
        "gates": layout.size,
        "prunable": prunable / whole,
        "p_supplement": p("supplement"),
        "p_exact": p("exact"),
        "kept_at_table": 1 - (1 - entry.p) * prunable / whole,
    }
