"""Magnitude: the norm of the weights that write a coupled channel.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (p = 1), for one layer's filters. A coupled channel is
written by several layers `l` with filters `w_l,c`, and they go together:

    s_c = (sum over l, i of |w_l,c,i|^p)^(1/p)

Powers are summed over ALL writers before the root is taken, and nothing is divided by a layer's mean or maximum, so
scores of different groups compare as they are. Biases are left out: they do not depend on what the channel detects,
and a normalisation behind the layer cancels them. A depthwise layer that carries the channel counts with its filter.

Cost: one pass over the weights of the writers; no minibatch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nni_plugin.criteria.weight_criterion import WeightCriterion, shares, weight_of, weight_writers
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup


class Magnitude(WeightCriterion):
    """Norm of all weights that write a channel.

    Args:
        p: Which norm: 1, 2 or any finite number above.
        joint: Over all layers that write the channel. False: of the first dense one alone, as tools do that look at
            one layer at a time.
    """

    def __init__(self, p: float = 2, joint: bool = True) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not math.isfinite(p) or p < 1:
            raise CriterionError(f"p must be a finite number of at least 1, got {p!r}.")
        self.p, self.joint = p, joint
        super().__init__()

    def _weigh(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        parts = shares(group, weight_writers(group), self.joint, "weights")
        norms = torch.cat([_norms(weight_of(model, member, index), self.p).cpu() for member, index, _ in parts])
        channel = torch.cat([channels for _, _, channels in parts])
        # The norm of a channel's filters is the norm of their norms.
        largest = _positive(norms.new_zeros(group.width).scatter_reduce(0, channel, norms, "amax"))
        powers = (norms / largest[channel]) ** self.p
        total: Tensor = largest * norms.new_zeros(group.width).index_add(0, channel, powers) ** (1 / self.p)
        return total


def _norms(rows: Tensor, p: float) -> Tensor:
    """Return the norm of each row, scaled by its largest weight so that high powers do not vanish."""
    largest = _positive(rows.abs().amax(dim=1))
    norms: Tensor = largest * torch.linalg.vector_norm(rows / largest[:, None], p, dim=1)
    return norms


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)
