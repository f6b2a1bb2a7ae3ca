"""Criteria on the gradients of every sample: Taylor-FG and Taylor-Fisher, at the cost of one backward pass.

Taylor-FG ("full gradient", Molchanov et al., CVPR 2019, supplement): `mean_n g_n^2` over the joint gate gradients of
single samples, instead of squares of a minibatch's mean.

Taylor-Fisher: removing a gate (z: 1 -> 0) changes the loss by `-g + 1/2 H` to second order; near a minimum the
diagonal of the Hessian is well approximated by that of the empirical Fisher, `H ~ F = mean_n g_n^2` (LeCun et al.,
"Optimal Brain Damage", 1990, with the Fisher of Theis et al., arXiv 1801.05787). The diagonal, joint Fisher alone is
Group Fisher Pruning's (Liu et al., ICML 2021); here the mean gradient stays in, so the signed score predicts the
loss change itself.

Cost: two reductions over each watched activation beside forward and backward.
"""

from __future__ import annotations

from torch import Tensor

from nni_plugin.criteria.gate_criterion import GateCriterion, Sums
from nni_plugin.criteria.gate_reader import Gates


class TaylorFG(GateCriterion):
    """Mean over samples of the squared joint gate gradient.

    Args:
        gates: Where the gate lies, see :class:`GateCriterion`.
    """

    per_sample = True

    def _statistics(self, joint: Tensor) -> Sums:
        return {"squares": joint.square().sum(0)}

    def _scores(self, mean: Sums) -> Tensor:
        return mean["squares"]


class TaylorFisher(GateCriterion):
    """Squared second-order loss change `(-g + 1/2 F)^2` of removing a channel.

    Args:
        gates: Where the gate lies, see :class:`GateCriterion`.
        signed: Score with the predicted loss change itself, so that channels whose removal lowers the loss go first.
    """

    per_sample = True
    predicts = True

    def __init__(self, gates: Gates = "auto", signed: bool = False) -> None:
        self.signed = signed
        super().__init__(gates)

    def _statistics(self, joint: Tensor) -> Sums:
        return {"gradient": joint.sum(0), "squares": joint.square().sum(0)}

    def _changes(self, mean: Sums) -> Tensor:
        return 0.5 * mean["squares"] - mean["gradient"]

    def _scores(self, mean: Sums) -> Tensor:
        change = self._changes(mean)
        return change if self.signed else change.square()
