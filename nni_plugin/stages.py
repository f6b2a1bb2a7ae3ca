"""How much goes of each stage: scores rearranged so that one ranking takes channels of all stages in proportion.

A stage is a prefix of layer names (`layer1` of a ResNet), with a fraction `r` of its channels to keep. Within a stage
channels go in the order of their scores. Across stages a channel's turn is the fraction of its stage that is gone by
then, divided by `1 - r`: at turn 1 every stage is at its fraction. The budget says at which turn removal ends, so the
removed fractions of the stages stay in the proportion asked, and the budget is met exactly as ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nni_plugin.errors import BudgetError
from nni_plugin.groups import ChannelGroup


def check_stages(stages: Mapping[str, float], names: Sequence[str]) -> None:
    """Check that every stage is there and every fraction is one.

    Args:
        stages: Fraction of channels to keep by prefix of layer names.
        names: Names of the groups that may be pruned.

    Raises:
        BudgetError: A stage has no group, or its fraction is not above 0 and at most 1.
    """
    for stage, ratio in stages.items():
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise BudgetError(f"stages: {stage} is the fraction kept and must be above 0 and at most 1, got {ratio!r}.")
        if not any(_within(name, stage) for name in names):
            tops = dict.fromkeys(name.split(".")[0] for name in names)
            raise BudgetError(f"stages: nothing to prune is named {stage!r}; there are {', '.join(tops)}.")


def turns(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    stages: Mapping[str, float],
    widths: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return scores by which channels of all stages go in proportion.

    Args:
        groups: The groups to choose from.
        scores: One score a channel by group name, higher = keep; `-inf` of one that is gone, `inf` of one that stays.
        stages: Fraction of channels to keep by prefix of layer names; the longest prefix counts. Groups of no stage
            stay whole, and so do those of a stage at 1.
        widths: Channels of each group of the dense network, which fractions refer to.

    Returns:
        Turns by group name, float64, shape `[width]`; those of a unit's channels add up to the turn of the unit.
    """
    turn = {group.name: torch.full((group.width,), math.inf, dtype=torch.float64) for group in groups}
    for stage, ratio in stages.items():
        inside = [group for group in groups if _stage_of(group.name, stages) == stage]
        if inside and ratio < 1:
            whole = (1 - ratio) * sum(widths[group.name] for group in inside)
            turn.update(_in_one_stage(inside, scores, whole, sum(widths[group.name] for group in inside)))
    return turn


def turns_by_make(
    groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], widths: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return scores by which groups built alike are compared with each other alone, and all lose the same fraction.

    Isomorphic ranking (Fang et al., ECCV 2024, section 3.2): scores of an attention, an MLP and a residual stream are
    on scales of their own, and one ranking over all empties whichever is lowest.

    Args:
        groups: The groups to choose from.
        scores: One score a channel by group name, higher = keep; `-inf` of one that is gone, `inf` of one that stays.
        widths: Channels of each group of the dense network, which fractions refer to.

    Returns:
        Turns by group name, as :func:`turns` does.
    """
    alike: dict[frozenset[tuple[str, str]], list[ChannelGroup]] = {}
    for group in groups:
        alike.setdefault(group.make, []).append(group)
    turn: dict[str, Tensor] = {}
    for inside in alike.values():
        dense = sum(widths[group.name] for group in inside)
        turn.update(_in_one_stage(inside, scores, float(dense), dense))
    return turn


def _in_one_stage(
    groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], to_go: float, dense: int
) -> dict[str, Tensor]:
    unit_scores, sizes = [], []
    for group in groups:
        sums = torch.zeros(group.units, dtype=torch.float64)
        unit_scores.append(sums.index_add(0, group.unit, scores[group.name].double()))
        sizes.append(torch.bincount(group.unit, minlength=group.units))
    score, size = torch.cat(unit_scores), torch.cat(sizes)
    alive = score > -math.inf
    gone = dense - int(size[alive].sum())
    order = torch.sort(torch.where(alive, score, math.inf), stable=True).indices
    before = torch.zeros(len(score), dtype=torch.float64)
    before[order] = (size[order].cumsum(0) - size[order]).double()
    turn = torch.where(score.isinf(), score, (gone + before + size / 2) / to_go)
    result = {}
    for group, own, width in zip(groups, turn.split([len(part) for part in sizes]), sizes, strict=True):
        result[group.name] = own[group.unit] / width[group.unit]
    return result


def _stage_of(name: str, stages: Mapping[str, float]) -> str | None:
    return max((stage for stage in stages if _within(name, stage)), key=len, default=None)


def _within(name: str, stage: str) -> bool:
    return name == stage or name.startswith(stage + ".")
