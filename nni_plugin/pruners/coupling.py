"""From NNI's targets to what is pruned as one: coupled groups, joined where they share a `dependency_group_id`.

A config_list speaks of layers, the trace of a network of groups. A group is pruned as the layers say that were selected
in it; layers that were not selected follow, since their channels are the same ones. An excluded layer keeps its group
whole. The network's output keeps its width whatever is selected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.errors import ConfigError
from nni_plugin.groups import ChannelGroup, Member, Slice
from nni_plugin.pruners.allocation import Bloc, Limits
from nni_plugin.pruners.wrapping import followers
from nni_plugin.tensors import CHANNEL_NORMS, kind_of, places_of, tensor_of, tie_period

_SHARED = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "global_group_id")


@dataclass(frozen=True, eq=False)
class Coupled:
    """Groups that are pruned alike, and the selected layers that say how much.

    Args:
        name: Of the first group.
        groups: One, or several that share a `dependency_group_id`; equally wide.
        layers: The selected layers, sorted.
        unit: Label of the unit of removal of each channel, int64, shape `[width]`.
        weights: Weights of the selected layers by channel, shape `[width]`.
    """

    name: str
    groups: tuple[ChannelGroup, ...]
    layers: tuple[str, ...]
    unit: Tensor
    weights: Tensor

    def bloc(self, spaces: Mapping[str, Any]) -> Bloc:
        """Return what goes of it, as the settings are now: a schedule changes them while training goes on.

        Args:
            spaces: The weight's target space of each selected layer.

        Raises:
            ConfigError: Layers that are pruned alike are configured differently.
        """
        found = {}
        for key in _SHARED:
            values = {layer: getattr(spaces[layer], key) for layer in self.layers}
            if len(set(values.values())) > 1:
                (a, x), (b, y) = next(
                    ((a, x), (b, y)) for a, x in values.items() for b, y in values.items() if a < b and x != y
                )
                raise ConfigError(
                    f"Layers {a!r} and {b!r} share their channels, so they are pruned alike, but their {key} is {x!r} "
                    f"and {y!r}. Give them the same, or select one of them. The model is unchanged."
                )
            found[key] = values[self.layers[0]]
        pool = found["global_group_id"]
        limits = Limits(
            found["sparse_ratio"],
            found["sparse_threshold"],
            0.0 if found["min_sparse_ratio"] is None else found["min_sparse_ratio"],
            1.0 if found["max_sparse_ratio"] is None else found["max_sparse_ratio"],
        )
        return Bloc(self.name, self.unit, self.weights, limits, None if pool is None else repr(pool))


def couple(
    model: nn.Module, groups: Sequence[ChannelGroup], spaces: Mapping[str, Any], excluded: Collection[str]
) -> tuple[list[Coupled], list[str]]:
    """Find what is pruned.

    Args:
        model: The network, unwrapped.
        groups: Its groups.
        spaces: The weight's target space of each selected layer.
        excluded: Layers that an exclusion of the config_list takes out.

    Returns:
        What is pruned, in the order of the network, and what else to know, a line each: which selected layers are left
        whole and why.

    Raises:
        ConfigError: Nothing is left to prune, or a `dependency_group_id` joins layers of different width.
    """
    layers = [sorted({member.path for member in followers(group)} & spaces.keys()) for group in groups]
    asked = [number for number, found in enumerate(layers) if found]
    ids = sorted({(number, repr(spaces[a].dependency_group_id)) for number in asked for a in layers[number]})
    pairs = [(a, b) for a, x in ids for b, y in ids if x == y != "None" and a < b]
    coupled, notes = [], _outside(groups, spaces)
    for numbers in _components(len(groups), pairs):
        names = sorted({name for number in numbers for name in layers[number]})
        if not names:
            continue
        parts = tuple(groups[number] for number in numbers)
        reason = _whole(parts, excluded)
        if reason is not None:
            notes.append(f"{', '.join(map(repr, names))} left whole: {reason}")
            continue
        if len({group.width for group in parts}) > 1:
            widths = ", ".join(f"{group.name!r} has {group.width}" for group in parts)
            raise ConfigError(
                f"dependency_group_id {spaces[names[0]].dependency_group_id!r} joins layers with different numbers of "
                f"channels ({widths}); give them different ids. The model is unchanged."
            )
        weights = sum((_weights(model, group, names) for group in parts), torch.zeros(parts[0].width))
        coupled.append(Coupled(parts[0].name, parts, tuple(names), _units(parts), weights))
    mixed = [m.path for one in coupled for group in one.groups for m in followers(group) if _mixes(model, m)]
    if mixed:
        notes.append(
            f"{mixed[0]!r} normalises over channels that are pruned (as do {len(mixed) - 1} others): its statistics "
            "change when they leave, so the compact network differs from the masked one"
        )
    if not coupled:
        raise ConfigError(f"config_list leaves nothing to prune: {'; '.join(notes)}. The model is unchanged.")
    return coupled, notes


def lone_groups(model: nn.Module, spaces: Mapping[str, Any]) -> list[ChannelGroup]:
    """Return a group for each layer alone, as if nothing were coupled.

    Args:
        model: The network, unwrapped.
        spaces: The weight's target space of each layer. Its `internal_metric_block` is the number of blocks of
            channels, one behind the other, that lose the same number each: here the same places.

    Raises:
        ConfigError: A layer's channels do not fill so many blocks.
    """
    groups = []
    for path in sorted(spaces):
        layer = model.get_submodule(path)
        places = places_of(layer, "out")
        weight = next(place for place in places if place.tensor == "weight")
        width = tensor_of(model, f"{path}.weight").shape[weight.dim]
        if weight.period is not None:  # transposed and grouped: its groups' outputs lie on each other, and are tied
            assert isinstance(layer, _ConvNd)
            width = layer.out_channels
        index = torch.arange(width)
        slices = tuple(Slice(f"{path}.{p.tensor}", p.dim, index[: p.period], index[: p.period]) for p in places)
        period = tie_period(layer, "out")
        blocks = spaces[path].internal_metric_block or 1
        if width % blocks:
            raise ConfigError(
                f"internal_metric_block {blocks} of {path!r} does not divide its {width} channels. The model is "
                "unchanged."
            )
        if period is None and blocks > 1:
            period = width // blocks
        ties = None if period is None else index % period
        member = Member(path, "out", kind_of(layer), index, index, slices, ties, writer=True)
        groups.append(ChannelGroup(path, width, (member,)))
    return groups


def _outside(groups: Sequence[ChannelGroup], spaces: Mapping[str, Any]) -> list[str]:
    inside = {member.path for group in groups for member in followers(group)}
    lost = sorted(spaces.keys() - inside)
    return [f"{', '.join(map(repr, lost))} left whole: not reached, or not called as layers"] if lost else []


def _mixes(model: nn.Module, member: Member) -> bool:
    return member.kind == "norm" and isinstance(model.get_submodule(member.path), CHANNEL_NORMS)


def _whole(groups: Sequence[ChannelGroup], excluded: Collection[str]) -> str | None:
    """Return why groups must keep all channels; None if they need not."""
    for group in groups:
        if group.fixed is not None:
            return group.fixed
        out = sorted({member.path for member in followers(group)} & set(excluded))
        if out:
            return f"{out[0]!r} holds the same channels and is excluded"
    return None


def _weights(model: nn.Module, group: ChannelGroup, layers: Collection[str]) -> Tensor:
    """Return how many weights of some layers each channel of a group stands for, as NNI counts: `weight` alone."""
    weights = torch.zeros(group.width, dtype=torch.float64)
    for member in followers(group):
        for piece in member.slices:
            if member.path in layers and piece.tensor.rpartition(".")[2] == "weight":
                tensor = tensor_of(model, piece.tensor)
                share = torch.full((len(piece.channel),), tensor.numel() / tensor.shape[piece.dim], dtype=torch.float64)
                weights.index_add_(0, piece.channel, share)
    return weights


def _units(groups: Sequence[ChannelGroup]) -> Tensor:
    """Return the units of removal of groups that share their mask: channels tied in any of them."""
    width = groups[0].width
    ties, offset = [], width
    for group in groups:
        ties += list(zip(range(width), (group.unit + offset).tolist(), strict=True))
        offset += group.units
    labels = [-1] * width
    for label, part in enumerate(_components(offset, ties)):
        for channel in part:
            if channel < width:
                labels[channel] = label
    dense: Tensor = torch.unique(torch.tensor(labels), return_inverse=True)[1]
    return dense


def _components(nodes: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of a graph, each ascending, in the order of their first nodes."""
    rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
    graph = coo_array(([1] * len(pairs), (rows, columns)), shape=(nodes, nodes))
    labels = connected_components(graph, directed=False)[1].tolist()
    parts: dict[int, list[int]] = {}
    for node, label in enumerate(labels):
        parts.setdefault(label, []).append(node)
    return list(parts.values())
