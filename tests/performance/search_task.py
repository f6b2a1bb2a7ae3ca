"""What the tests of searches share: digits, a small trained network, and a quick search."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.budgets import MACs
from nni_plugin.networks.resnet import ResNet
from nni_plugin.performance import PerformancePlanner, SearchOptions

Batch = tuple[Tensor, Tensor]

CASES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

QUICK = {"steps": 60, "predictor_start": 8, "predictor_warmup": 4, "predictor_batch": 16, "memory": 20, "candidates": 4}
"""Options of a search that takes seconds, and whose performance network has a say in two thirds of it."""


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits in an order of their own: 1,797 real images of 8 x 8."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]


def batches(first: int = 0, number: int = 10, size: int = 32) -> list[Batch]:
    images, labels = digits()
    return [(images[i : i + size], labels[i : i + size]) for i in range(first, first + number * size, size)]


EXAMPLE = torch.zeros(2, 1, 8, 8)


@cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(1, num_classes=10, in_chans=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in batches(0, 30) * 4:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def small_resnet() -> nn.Module:
    """A copy of a ResNet-8 trained on digits for four epochs, in eval mode."""
    return copy.deepcopy(_trained())


def planner(model: nn.Module, budget: Any = None, **options: Any) -> PerformancePlanner:
    """Return a planner with a quick search; keywords are its options."""
    chosen = SearchOptions(**{**QUICK, **options})
    return PerformancePlanner(model, EXAMPLE, loss_of, budget or MACs(0.6), options=chosen)


def prunable(model: nn.Module, example: Tensor) -> list[Any]:
    """Return the groups of a network that may be pruned."""
    return [group for group in find_groups(model, example) if group.fixed is None]


def hooks_on(model: nn.Module) -> int:
    """Count the hooks on a network."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
