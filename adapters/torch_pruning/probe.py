"""Try every group before it is trusted: part of its units are cut on a copy, which must compute what the mask does.

A trace sees operators, not intentions: a hard-coded reshape, a number of heads taken from elsewhere only show when
a channel is really gone. Groups that fail are left whole, with the reason, instead of failing in the middle of a run.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.torch_pruning.compare import compare
from nni_plugin.errors import GraphError, PlanError, SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.random_weights import randomise


def sound_groups(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> list[ChannelGroup]:
    """Return the groups, those that cannot be cut frozen with the reason; warns of each.

    Whether a group is sound depends on the network's structure, not on its weights: in the copies nothing is left at
    the zero or one where libraries start it, so that a branch that adds nothing cannot hide a wrong index.

    Args:
        model: The network; copied, left as it was.
        groups: Its coupled groups, as found.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        The same groups in the same order. All together are tried first: two forward passes when nothing is wrong.
        Otherwise the first group at fault is found by bisection. Where an attribute equals its width by chance, that
        attribute is left alone from then on; else the group is set aside with those built alike (the same attention
        in every block fails alike), until the rest passes; those built alike then get a trial of their own.
    """
    trial = _Trial(_randomised(model), groups, example_inputs)
    passed = [group for group in groups if group.fixed is None]
    failures: dict[str, str] = {}
    like: dict[str, str] = {}
    aside: list[ChannelGroup] = []
    while passed and (failure := trial(passed)) is not None:
        number, failure = _first_at_fault(trial, passed, failure)
        culprit = passed[number]
        chance = _sizes_by_chance(trial, passed[:number], culprit)
        if chance:
            passed = [_without_sizes(group, chance) if group.make == culprit.make else group for group in passed]
            continue
        failures[culprit.name] = failure
        alike = [group for group in passed if group is not culprit and group.make == culprit.make]
        failures.update({group.name: f"it is built like {culprit.name!r}: {failure}" for group in alike})
        like.update({group.name: culprit.name for group in alike})
        aside += alike
        passed = [group for group in passed if group.name not in failures]
    # Those set aside on the word of another, all at once: where they pass, only the one was at fault.
    if aside and trial([*passed, *aside]) is None:
        for group in aside:
            del failures[group.name]
    for name, failure in failures.items():
        if name not in like:
            others = sum(first == name and other in failures for other, first in like.items())
            more = f" (and {others} built like it)" if others else ""
            warnings.warn(f"Group {name!r} is left whole{more}: {failure}", stacklevel=3)
    sound = {group.name: group for group in (*aside, *passed)}
    return [
        group.freeze(failures[group.name]) if group.name in failures else sound.get(group.name, group)
        for group in groups
    ]


def without_chance(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> list[ChannelGroup] | None:
    """Return groups as found without the numbers that equal a width by chance; None where there is no such number.

    That shows only when groups are tried, as they were when a plan was made.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sound = sound_groups(model, groups, example_inputs)
    if all(len(one.sizes) == len(other.sizes) for one, other in zip(sound, groups, strict=True)):
        return None
    return [replace(group, sizes=tried.sizes) for group, tried in zip(groups, sound, strict=True)]


def _first_at_fault(trial: _Trial, groups: Sequence[ChannelGroup], failure: str) -> tuple[int, str]:
    """Return which group makes the groups up to it fail, where those before it do not, and how they fail."""
    low, high = 0, len(groups)  # the first `low` pass, the first `high` fail
    while high - low > 1:
        middle = (low + high) // 2
        found = trial(groups[:middle])
        if found is None:
            low = middle
        else:
            high, failure = middle, found
    return high - 1, failure


def _sizes_by_chance(trial: _Trial, passed: Sequence[ChannelGroup], culprit: ChannelGroup) -> set[str]:
    """Return the names of attributes without which a group passes: numbers that equal its width by chance."""
    names = sorted({size.name for size in culprit.sizes})
    for chance in [{name} for name in names] + [set(names)]:
        if trial([*passed, _without_sizes(culprit, chance)]) is None:
            return chance
    return set()


def _without_sizes(group: ChannelGroup, names: set[str]) -> ChannelGroup:
    return replace(group, sizes=tuple(size for size in group.sizes if size.name not in names))


class _Trial:
    """Cuts a part of some groups and says how that fails; None when it does not."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> None:
        self.model, self.groups, self.example_inputs = model, groups, example_inputs

    def __call__(self, tried: Sequence[ChannelGroup]) -> str | None:
        plan = PruningPlan(tuple(_without_part(group) for group in tried))
        groups = {group.name: group for group in (*self.groups, *tried)}
        try:
            parity = compare(self.model, plan, self.example_inputs, list(groups.values()))
        except (PlanError, SurgeryError) as error:
            return str(error)
        return None if parity.ok else str(parity)


def _randomised(model: nn.Module) -> nn.Module:
    try:
        model = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise GraphError(
            f"{type(model).__name__} cannot be copied ({error}). Take off torch.nn.utils.weight_norm, spectral_norm or "
            "prune first (remove_weight_norm, ..., or torch.nn.utils.parametrizations in their place)."
        ) from error
    with torch.no_grad():
        randomise(model)
    return model


def _without_part(group: ChannelGroup) -> GroupPlan:
    """Remove the first unit and others scattered among the rest: neighbours can hide a wrong index.

    Groups lose between a third and two thirds, each another part: code that divides one width by another's number, as
    `width // num_heads` does, looks right as long as both are halved.
    """
    part = 1 / 3 + zlib.crc32(group.name.encode()) / 2**32 / 3
    number = max(1, int(part * group.units))
    scattered = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))[:number]
    gone = torch.isin(group.unit, torch.cat([scattered, group.unit[:1]])) & (group.unit != group.unit[-1])
    return GroupPlan(group.name, group.width, tuple((~gone).nonzero().flatten().tolist()))
