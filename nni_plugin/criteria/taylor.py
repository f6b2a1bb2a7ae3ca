"""Taylor-FO: squared first-order loss change of removing a coupled channel.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, Eq. 8 with the gate after batch
normalisation (the paper's best form): per minibatch the gate gradients of ALL writers of a coupled channel are
summed, the sum is squared, squares are averaged over minibatches. No normalisation between layers.

Cost: one multiplication per parameter read; no hook, no gate module, no second backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from nni_plugin.criteria.first_order import member_gates
from nni_plugin.criteria.gate_criterion import GateCriterion, Sums
from nni_plugin.criteria.gate_reader import Gates
from nni_plugin.criteria.gates import accumulable
from nni_plugin.errors import CriterionError
from nni_plugin.groups import Member

Reduction = Literal["sum-then-square", "square-then-sum"]


class TaylorFO(GateCriterion):
    """Taylor-FO with joint gates over coupled layers.

    Args:
        gates: Where the gate lies, see :class:`GateCriterion`.
        reduction: `"sum-then-square"`: `(sum_s w_s g_s)^2` over all that goes with a channel, the gate's own form.
            `"square-then-sum"`: `sum_s (w_s g_s)^2`. On weights before a normalisation in train mode the former is
            zero by scale invariance, the latter is not.
    """

    def __init__(self, gates: Gates = "auto", reduction: Reduction = "sum-then-square") -> None:
        if reduction not in ("sum-then-square", "square-then-sum"):
            raise CriterionError(f"reduction must be 'sum-then-square' or 'square-then-sum', got {reduction!r}.")
        self.reduction = reduction
        super().__init__(gates)

    def _terms(self, model: nn.Module, members: Sequence[Member]) -> list[Tensor]:
        if self.reduction == "sum-then-square":
            return super()._terms(model, members)
        return [accumulable(term) for term in member_gates(model, members, squared=True)]

    def _statistics(self, joint: Tensor) -> Sums:
        return {"squares": joint.square() if self.reduction == "sum-then-square" else joint}

    def _scores(self, mean: Sums) -> Tensor:
        return mean["squares"]
