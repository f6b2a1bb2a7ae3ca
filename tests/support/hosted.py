"""A small residual network, a few images and a task for the pruners of the hosts."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.adapters.host_task import HostTask
from nni_plugin.budgets import MACs, Params
from nni_plugin.cost import count
from nni_plugin.networks.resnet import ResNet

CLASSES, SIDE = 5, 8
Batch = tuple[Tensor, Tensor]


def network(seed: int = 0) -> ResNet:
    """One block a stage, 8, 16 and 32 channels, normalisations not at their defaults; in train mode."""
    torch.manual_seed(seed)
    model = ResNet(1, num_classes=CLASSES, width_mult=0.5)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_var is not None
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model.train()


def minibatches(number: int = 3, images: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(images) % CLASSES
    return [(torch.randn(images, 3, SIDE, SIDE, generator=generator), labels) for _ in range(number)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


EXAMPLES = minibatches(1, 2)[0][0]


def task(method: str, budget: MACs | Params, model: nn.Module | None = None, **changes: Any) -> HostTask:
    """A task as `through_host` makes it; the model is copied."""
    model = network() if model is None else model
    arguments = {
        "model": copy.deepcopy(model),
        "examples": EXAMPLES,
        "method": method,
        "budget": budget,
        "dense": count(model, EXAMPLES),
        "batches": minibatches(),
        "loss_fn": loss,
        "classifier": ("fc",),
        "ignore": (),
        "seed": 0,
    }
    return HostTask(**(arguments | changes))
