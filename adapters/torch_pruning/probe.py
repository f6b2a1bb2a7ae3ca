"""Try every group before it is trusted: half its units are cut on a copy, which must compute what the mask does.

A dependency graph reads operators, not intentions: a hard-coded reshape, heads, a shuffle it misreads only show when
a channel is really gone. Groups that fail are left whole, with the reason, instead of failing in the middle of a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.torch_pruning.verify import verify
from nni_plugin.errors import PlanError, SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import GroupPlan, PruningPlan


def sound_groups(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> list[ChannelGroup]:
    """Return the groups, those that cannot be cut frozen with the reason; warns of each.

    Args:
        model: The network; copied, left as it was.
        groups: Its coupled groups, as found.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        The same groups in the same order. All together are tried first: two forward passes when nothing is wrong.
    """
    prunable = [group for group in groups if group.fixed is None]
    if not prunable or _failure(model, prunable, groups, example_inputs) is None:
        return list(groups)
    result = []
    for group in groups:
        failure = None if group.fixed else _failure(model, [group], groups, example_inputs)
        if failure is not None:
            warnings.warn(f"Group {group.name!r} is left whole: {failure}", stacklevel=4)
            group = group.freeze(failure)
        result.append(group)
    return result


def _failure(
    model: nn.Module, tried: Sequence[ChannelGroup], groups: Sequence[ChannelGroup], example_inputs: Any
) -> str | None:
    plan = PruningPlan(tuple(_without_half(group) for group in tried))
    try:
        parity = verify(model, plan, example_inputs, groups=groups)
    except (PlanError, SurgeryError) as error:
        return str(error)
    return None if parity.ok else str(parity)


def _without_half(group: ChannelGroup) -> GroupPlan:
    """Remove the first unit and others scattered among the rest: neighbours can hide a wrong index."""
    scattered = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))[: max(1, group.units // 2)]
    gone = torch.isin(group.unit, torch.cat([scattered, group.unit[:1]])) & (group.unit != group.unit[-1])
    return GroupPlan(group.name, group.width, tuple((~gone).nonzero().flatten().tolist()))
