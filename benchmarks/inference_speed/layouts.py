"""Networks of equal MACs and different widths: which layers the channels leave decides the speed.

Weights are random: no accuracy is in question here, widths are. Each layout is a score for every channel; one global
ranking (:mod:`nni_plugin.selection`) then meets the MACs exactly.

    even       every layer loses the same fraction of its channels
    even-8     the same, widths being multiples of 8
    fitted     early layers lose more or fewer than late ones, evenly over the depth, such that MACs and parameters are
               both those of the paper's network
    taylor-fo  what Taylor-FO (Molchanov et al., CVPR 2019) finds least important of these random weights leaves; widths
               are multiples of 8, so that no layer is left with a channel or two
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.benchmarks.inference_speed.table5 import Goal
from nni_plugin.budgets import MACs
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count
from nni_plugin.criteria import TaylorFO
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.planner import score_groups
from nni_plugin.random_weights import randomise
from nni_plugin.selection import Ranking, solve
from nni_plugin.slim_cost import SlimCost

LAYOUTS = {"even": 1, "even-8": 8, "fitted": 1, "taylor-fo": 8}
"""What widths are multiples of, by the name of a layout."""

DENSE = "dense"

_STEEPEST = 12.0
"""Most that `fitted` may tilt: the first layer then loses e^12 times the fraction that the last one loses."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A network to time.

    Attributes:
        goal: Name of its goal; `dense` for the network that was not pruned.
        layout: Name of its layout; `dense` likewise.
        network: In eval mode, on the CPU.
        about: MACs and parameters as counted on it, and its channels by stage, as JSON values.
    """

    goal: str
    layout: str
    network: nn.Module
    about: dict[str, Any]


def variants(
    network: nn.Module, goals: Sequence[Goal], layouts: Sequence[str], images: Tensor, seed: int
) -> list[Variant]:
    """Return the dense network and all that are made of it.

    Statistics of batch normalisations are those of the images in every network, so that activations keep their
    magnitude: neither overflow nor numbers so small that CPUs slow down.

    Args:
        network: Its batch normalisations are drawn anew, in place.
        goals: How much stays.
        layouts: Of `LAYOUTS`; `fitted` takes part where the goal says how many parameters stay.
        images: Random ones, `[N, C, H, W]`.
        seed: Of what is drawn: normalisations, and labels for the scores.

    Raises:
        BudgetError: A goal cannot be met.
    """
    randomise(network, seed)
    _settle(network.eval(), images)
    with torch.no_grad():
        classes = network(images[:1]).shape[1]
    labels = torch.randint(classes, (len(images),), generator=torch.Generator().manual_seed(seed))
    space = _Space(network, images, labels, by_data="taylor-fo" in layouts)
    made = [Variant(DENSE, DENSE, network, space.about(network, {}))]
    for goal in goals:
        for layout in layouts:
            if layout == "fitted" and goal.params is None:
                continue
            kept = space.kept(goal, layout)
            plan = PruningPlan(tuple(GroupPlan(n, space.widths[n], tuple(i.tolist())) for n, i in kept.items()))
            slim = plan.apply(copy.deepcopy(network), images[:1])
            _settle(slim, images)
            made.append(Variant(goal.name, layout, slim, space.about(slim, kept)))
    return made


class _Space:
    """The channels of a network, what they cost, and their scores by layout."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, *, by_data: bool) -> None:
        self.image = images[:1]
        self.groups = [group for group in find_groups(network, self.image) if group.fixed is None]
        self.widths = {group.name: group.width for group in self.groups}
        self.cost = SlimCost(network, self.image, self.groups)
        self._taylor: Mapping[str, Tensor] = {}
        if by_data:
            self._taylor = score_groups(network, self.groups, TaylorFO(), [(images, labels)], cross_entropy)

    def kept(self, goal: Goal, layout: str) -> dict[str, Tensor]:
        """Return the channels that each group keeps, those that may lose some."""
        groups = [group for group in self.groups if group.residual or not goal.skip_only]
        if layout == "taylor-fo":
            return self._solved(groups, self._taylor, goal, LAYOUTS[layout])
        tilt = self._fitting_tilt(groups, goal) if layout == "fitted" else 0.0
        return self._solved(groups, tilted(groups, tilt), goal, LAYOUTS[layout])

    def about(self, network: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, Any]:
        """Describe a network that keeps these channels."""
        counted = count(network, self.image)
        widths = {name: len(kept[name]) if name in kept else width for name, width in self.widths.items()}
        stages: dict[str, list[int]] = {}
        for name, width in self.widths.items():
            stage = stages.setdefault(name.partition(".")[0], [0, 0])
            stage[0], stage[1] = stage[0] + widths[name], stage[1] + width
        return {"macs": counted.macs, "params": counted.params, "stages": stages, "widths": widths}

    def _solved(
        self, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], goal: Goal, round_to: int
    ) -> dict[str, Tensor]:
        ranking = Ranking(groups, scores, round_to=round_to)
        return solve(ranking, MACs(goal.macs), self.cost.dense, self.cost.predict)[1]

    def _fitting_tilt(self, groups: Sequence[ChannelGroup], goal: Goal) -> float:
        """Return the tilt at which the parameters are the goal's too: the steeper, the more of them stay."""
        assert goal.params is not None
        wanted = goal.params * self.cost.dense.cost.params

        def excess(tilt: float) -> float:
            return self.cost.predict(self._solved(groups, tilted(groups, tilt), goal, 1)).cost.params - wanted

        least, most = excess(-_STEEPEST), excess(_STEEPEST)
        if not least <= 0 <= most:
            raise BudgetError(
                f"{goal.name}: with {goal.macs:.3f} of the MACs {(least + wanted) / 1e6:.2f} to "
                f"{(most + wanted) / 1e6:.2f} M parameters can stay, not {wanted / 1e6:.2f} M: leave out 'fitted'."
            )
        return float(brentq(excess, -_STEEPEST, _STEEPEST, xtol=1e-3))


def tilted(groups: Sequence[ChannelGroup], tilt: float) -> dict[str, Tensor]:
    """Score channels such that, wherever the line is drawn, groups lose fractions that fall evenly with depth.

    Below a line `t` lies the fraction `t * exp(-tilt * depth)` of a group, where depth runs from 0 (the first group) to
    1 (the last).

    Args:
        groups: In the order of the network.
        tilt: 0: all lose the same fraction; above 0 the first ones lose more.

    Returns:
        Scores by group name, float64, `[width]`, higher = keep.

    Example:
        >>> first, last = (ChannelGroup(name, 2, ()) for name in "ab")
        >>> [score.tolist() for score in tilted([first, last], math.log(2)).values()]
        [[0.25, 0.75], [0.5, 1.5]]
    """
    scores = {}
    for place, group in enumerate(groups):
        depth = place / max(len(groups) - 1, 1)
        scores[group.name] = (torch.arange(group.width, dtype=torch.float64) + 0.5) / group.width
        scores[group.name] *= math.exp(tilt * depth)
    return scores


def _settle(network: nn.Module, images: Tensor) -> None:
    reestimate_batchnorm(network, [images], lambda model, batch: model(batch))
