"""BN scale: the scaling factors behind a coupled channel.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017: a channel is worth the
factor `gamma` of the normalisation behind it. A coupled channel has one normalisation for each writer:

    s_c = sum over its normalisations of |gamma_c|

The paper trains with an L1 penalty on the factors, and without it they say little. Normalisations whose output only
reaches a depthwise layer of the same channel are superseded by the one behind that layer.

Cost: one number a channel and writer; no minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nni_plugin.criteria.weight_criterion import WeightCriterion, layer_of, shares, weight_of
from nni_plugin.groups import ChannelGroup


class BNScale(WeightCriterion):
    """Sum of the absolute scaling factors of the normalisations that write a channel.

    Batch, group, layer and instance normalisations count alike.

    Args:
        joint: Over all of them. False: of the first one alone, as tools do that look at one layer at a time.
    """

    def __init__(self, joint: bool = True) -> None:
        self.joint = joint
        super().__init__()

    def _weigh(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        norms = [
            member
            for member in group.writers
            if member.kind == "norm" and getattr(layer_of(model, member), "weight", None) is not None
        ]
        total = torch.zeros(group.width, dtype=torch.float64)
        for member, index, channel in shares(group, norms, self.joint, "affine normalisation behind them"):
            total.index_add_(0, channel, weight_of(model, member, index)[:, 0].abs().cpu())
        return total
