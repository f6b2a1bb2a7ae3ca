"""Geometric median: how far a coupled channel's filters lie from those of the others.

He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR 2019. What
lies near the geometric median of all filters can be replaced by the others, whatever its norm:

    s_c = sum over c' of || x_c - x_c' ||_2

with `x_c` all filters that write the coupled channel `c`, one after the other (zero where a layer does not write it):
joint over writers, Euclidean distances, not their squares. Channels whose weights are all zero are held at zero by a
mask; nobody is compared with them, so that a masked network scores what the cut one does.

Cost: width^2 distances of the filters' length, as matrix products in float64, some rows at a time; no minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nni_plugin.criteria.weight_criterion import WeightCriterion, shares, weight_of, weight_writers
from nni_plugin.groups import ChannelGroup

_BLOCK = 2**21
"""Distances held at a time: 16 MiB."""


class GeometricMedian(WeightCriterion):
    """Sum of distances between a channel's filters and those of all other channels of its group."""

    def _weigh(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        filters = joint_filters(model, group)
        others = filters[filters.any(dim=1)]
        if len(others) == 0:
            return filters.new_zeros(group.width)
        # Distances stay as they are when all filters are shifted, and products of small numbers are exact longer.
        centre = others.mean(dim=0)
        filters, others = filters - centre, others - centre
        rows = max(1, _BLOCK // len(others))
        return torch.cat([torch.cdist(block, others).sum(dim=1) for block in filters.split(rows)])


def joint_filters(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return all filters that write each channel, one after the other: float64, shape `[width, weights]`."""
    parts = []
    for member, index, channel in shares(group, weight_writers(group), True, "weights"):
        rows = weight_of(model, member, index)
        turn = _turns(channel, group.width).to(rows.device)
        part = rows.new_zeros(group.width, int(turn.max()) + 1, rows.shape[1])
        part[channel.to(rows.device), turn] = rows
        parts.append(part.flatten(1))
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1)


def _turns(channel: Tensor, width: int) -> Tensor:
    """Return for each position how many before it hold the same channel."""
    order = torch.argsort(channel, stable=True)
    counts = torch.bincount(channel, minlength=width)
    first = counts.cumsum(0) - counts
    turns = torch.empty_like(channel)
    turns[order] = torch.arange(len(channel)) - first[channel[order]]
    return turns
