"""What the pruner costs within the paper's ResNet-101 schedule: 100 steps of 100 channels.

Molchanov et al., CVPR 2019, supplement 6.2 prune 100 channels every 30 minibatches of 256 images of 224 x 224. Here a
real training loop runs all 100 steps with fewer and smaller minibatches, which can only raise the pruner's share: its
work does not depend on the images, training does. `share` is of what ran; `share_at_30_minibatches` counts the parts
as often as the paper's schedule has them, still with the small minibatches.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import timm
import torch
import torch.nn.functional as F

from nni_plugin.budgets import Channels
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.criteria import TaylorFO
from nni_plugin.schedules import Iterative

STEPS, CHANNELS, PAPER_MINIBATCHES = 100, 100, 30


def run(minibatches: int = 2, batch_size: int = 8, size: int = 224) -> dict[str, Any]:
    """Run the schedule; returns seconds and the pruner's share of the whole (0.03 = 3 %).

    Args:
        minibatches: Between two steps, at least 2: the work of masking shows in those without a step.
        batch_size: Images in a minibatch.
        size: Height and width of the images.
    """
    torch.manual_seed(0)
    model = timm.create_model("resnet101", num_classes=10)
    images, labels = torch.randn(batch_size, 3, size, size), torch.randint(0, 10, (batch_size,))
    begun = time.perf_counter()
    pruner = ChannelPruner(model, images[:1], TaylorFO(), Channels(1.0), cut="never")
    setup = time.perf_counter() - begun
    total = pruner.dense.channels
    pruner.budget = Channels(total - STEPS * CHANNELS)
    pruner.schedule = Iterative(CHANNELS, minibatches)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()
    scoring: list[float] = []
    masking: list[float] = []
    planning: list[float] = []
    begun = time.perf_counter()
    while not pruner.done:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        before = time.perf_counter()
        pruner.on_backward(float(loss.detach()))
        scoring.append(time.perf_counter() - before)
        optimizer.step()
        before, steps = time.perf_counter(), len(pruner.steps)
        pruner.on_step()
        (planning if len(pruner.steps) > steps else masking).append(time.perf_counter() - before)
    whole = time.perf_counter() - begun
    own = sum(scoring) + sum(masking) + sum(planning)
    training = (whole - own) / len(scoring)
    per_minibatch = statistics.mean(scoring) + statistics.mean(masking)
    per_step = statistics.mean(planning)
    paper = per_minibatch + per_step / PAPER_MINIBATCHES
    return {
        "seed": 0,
        "network": "timm resnet101, 10 classes",
        "steps": len(pruner.steps),
        "channels": {"before": total, "after": pruner.steps[-1]["channels"]},
        "minibatches_between_steps": minibatches,
        "images": [batch_size, 3, size, size],
        "setup_seconds": setup,
        "training_seconds_per_minibatch": training,
        "scoring_and_masking_seconds_per_minibatch": per_minibatch,
        "planning_seconds_per_step": per_step,
        "share": own / whole,
        "share_at_30_minibatches": paper / (paper + training),
    }
