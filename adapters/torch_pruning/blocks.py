"""Blocks and channels in one plan: the blocks leave first, then channels of the network that remains.

Removing a block changes what is coupled: a writer of the residual stream is gone, or the layers on both sides of a
unit meet. So the groups of such a plan are those of the network without the blocks, under the names of the dense one.
A group that was made on the dense network and is rooted in a removed block lives on in the one that its other members
belong to, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.adapters.torch_pruning.surgery import CUTS, REMOVED, Cut
from nni_plugin.errors import PlanError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.layers.removal import Removal
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.renumbering import Renumbering


def channel_part(
    plan: PruningPlan, removal: Removal, dense: nn.Module, slim: nn.Module, example_inputs: Any
) -> tuple[PruningPlan, list[ChannelGroup]]:
    """Return what remains of a plan once its blocks have left, in the names of the smaller network, and its groups.

    Args:
        plan: A plan with blocks.
        removal: How they leave.
        dense: The network with its blocks.
        slim: The same without them.
        example_inputs: Inputs to trace both with.

    Raises:
        PlanError: Channels that meet where a block leaves are not the same ones.
    """
    rest = replace(plan, groups=(), removed_blocks=(), shells=())
    if not plan.groups:
        return rest, []
    groups = find_groups(slim, example_inputs)
    by_name = {removal.names.before(group.name): group for group in groups}
    entries: dict[str, GroupPlan] = {}
    moved: list[GroupPlan] = []
    for entry in plan.groups:
        if entry.name in by_name:
            name = by_name[entry.name].name
            entries[name] = replace(entry, name=name)
        elif not removal.holds(entry.name):
            entries[entry.name] = entry  # unknown: the surgery says so
        elif entry.removed or entry.factors is not None:
            moved.append(entry)
    if moved:
        known = {group.name: group for group in find_groups(dense, example_inputs)}
        for entry in moved:
            found = _lives_on(entry, known.get(entry.name), removal, groups)
            if found is not None:
                entries[found.name] = _both(entries.get(found.name), found, entry)
    return replace(rest, groups=tuple(entries.values())), groups


def check_units(model: nn.Module, removal: Removal, earlier: PruningPlan | None, example_inputs: Any) -> None:
    """Refuse to remove a unit on whose two sides different channels have been removed before.

    Channel `i` behind it would be fed by another channel `i`: no plan on the dense network does that.

    Raises:
        PlanError: There is such a unit.
    """
    units = [block for block in removal.blocks if block.kind == "unit"]
    if earlier is None or earlier.channels_removed == 0 or not units:
        return
    groups = find_groups(model, example_inputs)
    dense, entries = Renumbering(earlier.removed_blocks, earlier.shells), {e.name: e for e in earlier.groups}

    def dense_channels(group: ChannelGroup) -> tuple[int, tuple[int, ...]]:
        entry = entries.get(dense.before(group.name))
        return (group.width, tuple(range(group.width))) if entry is None else (entry.total, entry.kept)

    for unit in units:
        layers = [layer for path, layer in model.named_modules() if unit.holds(path)]
        counts = ("in_channels", "out_channels", "in_features", "out_features")
        if any(getattr(layer, name, 0) == 1 for layer in layers for name in counts):
            raise PlanError(
                f"Unit {unit.name!r} joins single channels; whether different ones have been removed before cannot be "
                "seen in the network. Remove the unit first, or in one plan with its channels. The model is unchanged."
            )
        touching = [g for g in groups if any(unit.holds(m.path) for m in g.members)]
        ends = [g for g in touching if not (all(unit.holds(m.path) for m in g.members) and g.readers)]
        if len(set(map(dense_channels, ends))) > 1:
            names = " and ".join(repr(group.name) for group in ends)
            raise PlanError(
                f"Unit {unit.name!r} joins channels {names}, of which different ones have been removed before. Remove "
                "the unit first, or in one plan with its channels. The model is unchanged."
            )


def note_removed(before: Mapping[nn.Parameter, str], model: nn.Module, digest: str) -> Callable[[], None]:
    """Note which parameters a plan took out of a network, for optimizers; returns what takes the notes back.

    Args:
        before: The parameters that it had.
        model: The network now.
        digest: The plan's digest.
    """
    after = set(model.parameters())
    for parameter in before:
        if parameter in after:
            CUTS.setdefault(parameter, []).append(Cut(digest, tuple(parameter.shape), {}))
        else:
            REMOVED.setdefault(parameter, []).append(digest)

    def undo() -> None:
        for parameter in before:
            (CUTS if parameter in after else REMOVED)[parameter].pop()

    return undo


def _lives_on(
    entry: GroupPlan, group: ChannelGroup | None, removal: Removal, groups: Sequence[ChannelGroup]
) -> GroupPlan | None:
    """Return the entry for the group that a dense one has become; None where all its members leave."""
    if group is None or group.width != entry.total:
        raise PlanError(f"The plan is for another model: there is no group {entry.name!r}. The model is unchanged.")
    names = removal.names
    for member in group.members:
        path = None if removal.holds(member.path) else names.after(member.path)
        for slim in groups:
            for other in slim.members:
                if (other.path, other.axis) == (path, member.axis):
                    return _translated(entry, group, member, slim, other)
    return None


def _translated(entry: GroupPlan, group: ChannelGroup, member: Member, slim: ChannelGroup, other: Member) -> GroupPlan:
    """Say in the channels of another group what is kept, by the positions of a layer that is in both."""
    place = torch.full((int(max(member.index.max(), other.index.max())) + 1,), -1, dtype=torch.int64)
    place[member.index] = member.channel
    to_dense = torch.full((slim.width,), -1, dtype=torch.int64)
    to_dense[other.channel] = place[other.index]
    kept = {channel: i for i, channel in enumerate(entry.kept)}
    stays = [i for i, channel in enumerate(to_dense.tolist()) if channel == -1 or channel in kept]
    factors = None
    if entry.factors is not None:
        factors = tuple(1.0 if to_dense[i] == -1 else entry.factors[kept[int(to_dense[i])]] for i in stays)
    return GroupPlan(slim.name, slim.width, tuple(stays), factors, entry.score_range)


def _both(there: GroupPlan | None, found: GroupPlan, entry: GroupPlan) -> GroupPlan:
    if there is None or not (there.removed or there.factors):
        return found
    if there.kept != found.kept or (there.factors and found.factors):
        raise PlanError(
            f"Groups {there.name!r} and {entry.name!r} meet where a block is removed, and different channels (or "
            "factors for both) are asked for; keep the same channels in both. The model is unchanged."
        )
    return replace(found, factors=there.factors or found.factors)
