"""Taylor criterion on feature maps: the mean product of a channel's activations and their gradients.

Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, arXiv
1611.06440, Sec. 2.2: per sample `| 1/M sum_m a_m dE_n/da_m |` over the `M` positions of a channel's feature map,
averaged over samples, then divided by the L2 norm of the layer's scores. A coupled channel has several feature maps,
one behind each layer that writes it; they are removed together, so their means are added before the absolute value.

The mean over positions makes large maps cheap to remove, which :class:`~nni_plugin.criteria.TaylorFG`, a sum, does not.
The code of the later paper (CVPR 2019) takes the absolute value of each product instead, so that positions cannot
cancel: `absolute="position"`, with the terms of several writers added.

Cost: two reductions over each watched activation; one more copy of it for `absolute="position"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.gate_criterion import GateCriterion, Sums
from nni_plugin.criteria.gate_reader import Gates
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

Absolute = Literal["map", "position"]


class FeatureMap(GateCriterion):
    """Mean over samples of the absolute mean product of activations and gradients.

    Args:
        gates: Whose feature maps, see :class:`GateCriterion`. A linear layer behind a flattened map reads each
            position as a feature of its own: on the side of the readers their sum counts there, not their mean.
        absolute: Of a map's mean (`"map"`, the paper) or of each position's product (`"position"`).
        normalize: Divide by the L2 norm of the group's scores, as the paper does, so that layers compare.
    """

    per_sample = True

    def __init__(self, gates: Gates = "auto", absolute: Absolute = "map", normalize: bool = True) -> None:
        if absolute not in ("map", "position"):
            raise CriterionError(f"absolute must be 'map' or 'position', got {absolute!r}.")
        self.absolute, self.normalize = absolute, normalize
        super().__init__(gates)

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Criterion]:
        """Watch a network while minibatches run, see :meth:`GateCriterion.collect`."""
        with super().collect(model, groups):
            assert self._watcher is not None
            self._watcher.reduction = "mean" if self.absolute == "map" else "mean-abs"
            yield self

    def _statistics(self, joint: Tensor) -> Sums:
        return {"absolute": joint.abs().sum(0)}

    def _scores(self, mean: Sums) -> Tensor:
        return mean["absolute"]

    def _score(self, group: ChannelGroup) -> Tensor:
        scores = super()._score(group)
        norm = scores.norm()
        return scores / norm if self.normalize and float(norm) > 0 else scores
