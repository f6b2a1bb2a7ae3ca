"""Try every group before it is trusted: half its units are cut on a copy, which must compute what the mask does.

A dependency graph reads operators, not intentions: a hard-coded reshape, heads, a shuffle it misreads only show when
a channel is really gone. Groups that fail are left whole, with the reason, instead of failing in the middle of a run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nni_plugin.adapters.torch_pruning.verify import verify
from nni_plugin.errors import PlanError, SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import GroupPlan, PruningPlan


def sound_groups(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> list[ChannelGroup]:
    """Return the groups, those that cannot be cut frozen with the reason; warns of each.

    Whether a group is sound depends on the network's structure, not on its weights: the copies get random
    normalisation parameters, so that a branch that starts at zero cannot hide a wrong index.

    Args:
        model: The network; copied, left as it was.
        groups: Its coupled groups, as found.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        The same groups in the same order. All together are tried first: two forward passes when nothing is wrong;
        otherwise one after the other, each beside those that have passed.
    """
    prunable = [group for group in groups if group.fixed is None]
    drawn = _randomised(model)
    if not prunable or _failure(drawn, prunable, groups, example_inputs) is None:
        return list(groups)
    result: list[ChannelGroup] = []
    passed: list[ChannelGroup] = []
    for group in tqdm(groups, desc="try groups", delay=2, disable=None, leave=False):
        failure = None if group.fixed else _failure(drawn, [*passed, group], groups, example_inputs)
        if failure is not None:
            warnings.warn(f"Group {group.name!r} is left whole: {failure}", stacklevel=4)
            group = group.freeze(failure)
        elif group.fixed is None:
            passed.append(group)
        result.append(group)
    return result


def _randomised(model: nn.Module) -> nn.Module:
    """Return a copy whose vectors (scales, biases, statistics) are drawn from 0.5 to 1.5."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=generator) + 0.5
            tensor.data.copy_(drawn)
    return model


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
